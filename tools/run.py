import runpy

runpy.run_module("attrib.cli.run", run_name="__main__")
