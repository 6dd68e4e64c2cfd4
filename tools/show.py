import runpy

runpy.run_module("attrib.cli.show", run_name="__main__")
