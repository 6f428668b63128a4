"""What a Flex Template's launcher runs: the command `embeam embed` with the template's parameters as its flags."""

import sys

from pipeline.cli.main import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
