import runpy

runpy.run_module("attrib.cli.report", run_name="__main__")
