import runpy

runpy.run_module("attrib.cli.table", run_name="__main__")
