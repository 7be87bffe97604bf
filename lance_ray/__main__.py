"""Entry point of ``lance-ray`` and ``python -m lance_ray``: starts without the extra ``cli`` too, to say what to do."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how it is installed."""
    try:
        from lance_ray.cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.exit("lance-ray: the command line needs typer: pip install 'lance-ray[cli]'")
    run()


if __name__ == "__main__":
    main()
