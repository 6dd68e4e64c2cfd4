import runpy

runpy.run_module("attrib.cli.compare_trees", run_name="__main__")
