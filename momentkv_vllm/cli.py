"""The console script `momentkv`."""

import argparse
import sys

from momentkv_vllm import doctor
from momentkv_vllm.calibrate import run


def main() -> int:
    """`momentkv doctor [--json]`: exit status 0 when eviction can run here. `momentkv calibrate`: 2 when it cannot measure."""
    parser = argparse.ArgumentParser(prog="momentkv", description="KV eviction for vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "doctor", help="versions, device, which kernel families work here, and which policies are installed"
    )
    check.add_argument("--json", action="store_true", help="machine-readable output")
    calibrate = commands.add_parser(
        "calibrate",
        help="how small a KV budget may be on your own texts",
        epilog="All other options are those of `vllm serve`, --kv-eviction and --kv-eviction-config among them.",
        allow_abbrev=False,
    )
    run.add_options(calibrate)
    args, others = parser.parse_known_args()
    if args.command == "calibrate":
        try:
            run.calibrate(args, others)
        except ValueError as error:
            print(f"momentkv calibrate: {error}", file=sys.stderr)
            return 2
        return 0
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    report = doctor.examine()
    print(doctor.as_json(report) if args.json else doctor.as_text(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
