import runpy

runpy.run_module("attrib.cli.graph", run_name="__main__")
