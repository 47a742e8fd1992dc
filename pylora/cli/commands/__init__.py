"""One module a subcommand; see `pylora.cli.registry`."""
