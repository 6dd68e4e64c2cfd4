"""The command ``attrib``: one module per subcommand, each parses, composes and calls."""
