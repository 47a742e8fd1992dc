"""The `pylora` command. `pylora.cli.registry` tells how a subcommand is added."""


def main() -> None:
    """Run the command line and exit with its status."""
    from pylora.cli.app import build_app

    build_app()(prog_name="pylora")
