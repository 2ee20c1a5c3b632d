"""`python -m moescope`, the form in which `torchrun -m` starts it."""

from moescope.cli.main import main

if __name__ == "__main__":
    main()
