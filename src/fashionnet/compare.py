"""What differs between two runs: their configurations, environments and results.

python -m fashionnet.compare --config RUN_A RUN_B
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from fashionnet import differences
from fashionnet.arguments import Parser
from fashionnet.differences import Difference
from fashionnet.errors import reported


def compare_configs(run_a: str | Path, run_b: str | Path) -> dict[str, list[Difference]]:
    """Returns what differs between two runs, by part: config, environment, results.

    Of the epochs, the first that differs and the first quantity in it are named.

    Raises:
        UserError: one of them is no run, or damaged.
    """
    first, second = differences.read(run_a), differences.read(run_b)
    return {
        "config": differences.of_config(first, second),
        "environment": differences.of_environment(first, second),
        "results": differences.of_results(first, second),
    }


def told(found: dict[str, list[Difference]]) -> str:
    """Returns what people are told of the differences, part by part."""
    lines = []
    for part, parts in found.items():
        lines.append(f"{part}: {'the same' if not parts else ''}".rstrip())
        lines += [f"  {difference}" for difference in parts]
    return "\n".join(lines)


def main() -> None:
    """The command: `python -m fashionnet.compare`."""
    with reported():
        parser = Parser("compare", __doc__)
        parser.add_argument(
            "--config", nargs=2, metavar=("RUN_A", "RUN_B"), required=True, help="two runs"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")
        given = parser.parse_args()
        found = compare_configs(*given.config)
    if given.json:
        print(json.dumps({part: [asdict(d) for d in parts] for part, parts in found.items()}))
    else:
        print(told(found))


if __name__ == "__main__":
    main()
