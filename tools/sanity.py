import runpy

runpy.run_module("attrib.cli.sanity", run_name="__main__")
