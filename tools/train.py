import runpy

runpy.run_module("attrib.cli.train", run_name="__main__")
