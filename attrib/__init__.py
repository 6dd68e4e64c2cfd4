"""attrib: attribution experiments whose numbers can be trusted, resumed and compared."""

__version__ = "0.1.0"
