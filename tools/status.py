import runpy

runpy.run_module("attrib.cli.status", run_name="__main__")
