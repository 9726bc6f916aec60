"""`python -m headstart`."""

from headstart.cli import run

if __name__ == "__main__":
    run()
