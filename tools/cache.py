import runpy

runpy.run_module("attrib.cli.cache", run_name="__main__")
