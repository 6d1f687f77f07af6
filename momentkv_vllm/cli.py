"""The console script `momentkv`."""

import argparse
import sys

from momentkv_vllm import doctor


def main() -> int:
    """`momentkv doctor [--json]`; exit status 0 when eviction can run here."""
    parser = argparse.ArgumentParser(prog="momentkv", description="KV eviction for vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "doctor", help="versions, device, which kernel families work here, and which policies are installed"
    )
    check.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args()
    report = doctor.examine()
    print(doctor.as_json(report) if args.json else doctor.as_text(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
