"""`python -m infold`, and `accelerate launch -m infold`."""

from infold.cli.startup import run

if __name__ == "__main__":
    run()
