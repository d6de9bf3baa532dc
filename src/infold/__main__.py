"""`python -m infold`, and `accelerate launch -m infold`."""

from infold.cli.main import run

if __name__ == "__main__":
    run()
