"""What a Flex Template starts: `fusion embed` with the template's parameters.

Dataflow's template launcher wants the job written to a file (`--template_location`) and does not wait for it. Then the
units cannot be judged here: `fusion status TABLE` and `fusion verify TABLE` tell how the job went.
"""

import sys
from collections.abc import Sequence

from pipelines import cli


def main(argv: Sequence[str]) -> int:
    """The exit code: that of `fusion embed`, or 0 where the job was handed over and none has run yet."""
    code = cli.main(["embed", "--quiet", *argv])
    handed_over = any(argument.startswith("--template_location") for argument in argv)
    return cli.DONE if handed_over and code == cli.FAILED else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
