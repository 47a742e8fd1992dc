"""`python -m pylora`: the same as the `pylora` command."""

from pylora.cli import main

if __name__ == "__main__":
    main()
