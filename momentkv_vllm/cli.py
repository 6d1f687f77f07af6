"""The console script `momentkv`."""

import argparse
import sys

from momentkv_vllm import doctor, state_client
from momentkv_vllm.calibrate import run


def main() -> int:
    """`momentkv doctor [--json]`: exit status 0 when eviction can run here. `momentkv calibrate` and `momentkv states`: 2 when
    they cannot do what was asked."""
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
    state_client.add_options(
        commands.add_parser("states", help="save and load the states of prefixes of a running server")
    )
    args, others = parser.parse_known_args()
    if others and args.command != "calibrate":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if args.command in ("calibrate", "states"):
        try:
            run.calibrate(args, others) if args.command == "calibrate" else state_client.run(args)
        except (ValueError, OSError) as error:
            print(f"momentkv {args.command}: {error}", file=sys.stderr)
            return 2
        return 0
    report = doctor.examine()
    print(doctor.as_json(report) if args.json else doctor.as_text(report))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
