import runpy

runpy.run_module("attrib.cli.prepare_imagenet", run_name="__main__")
