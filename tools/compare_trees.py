from attrib.cli.main import main

main("compare-trees")
