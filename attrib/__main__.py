"""``python -m attrib`` is the command ``attrib``."""

from attrib.cli.main import main

main()
