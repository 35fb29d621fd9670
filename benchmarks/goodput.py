"""The best checkpoint interval and the expected goodput for clusters of several sizes.

    python benchmarks/goodput.py
    python benchmarks/goodput.py --failures-per-node-day 0.005 --save-seconds 2 --write-seconds 60 \
        --restart-seconds 600 --step-seconds 5 --nodes 8 64 512 --plot goodput.png
    python benchmarks/goodput.py --run runs/x

Prints for each number of nodes: the mean time between failures of the run; the intervals of Young's first-order formula
and of Daly's formula, in steps; the interval with the highest simulated goodput (mean of --seeds runs, with the same
failures for every interval) and that goodput. --run simulates a finished run with its own failures and costs, and
compares this with its measured goodput. The default of 0.004 failures per node and day is Llama 3's: 419 unexpected
interruptions in 54 days on 2,048 nodes (arXiv 2407.21783, section 3.3.4).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for running this file as a script

from benchmarks.failure_simulation import (
    SECONDS_PER_DAY,
    Costs,
    best_interval,
    first_order,
    higher_order,
    mean_goodput,
    replay,
    seconds_between_failures,
)
from megatron_cm3leon.common.cli import run_tool
from megatron_cm3leon.config.loading import load_config
from megatron_cm3leon.monitoring.goodput import read_time_breakdown
from megatron_cm3leon.monitoring.status import show_seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[8, 64, 512], help="sizes of the clusters, in nodes (8 64 512)"
    )
    parser.add_argument(
        "--failures-per-node-day", type=float, default=0.004, help="failures that end a run, per node and day (0.004)"
    )
    parser.add_argument("--step-seconds", type=float, default=5.0, help="time of an optimizer step (5)")
    parser.add_argument("--save-seconds", type=float, default=1.0, help="stall of training per save (1)")
    parser.add_argument(
        "--write-seconds",
        type=float,
        default=60.0,
        help="from the end of the stall until the checkpoint is complete (60)",
    )
    parser.add_argument("--restart-seconds", type=float, default=600.0, help="from a failure to the next step (600)")
    parser.add_argument(
        "--failures", type=int, default=100, help="expected failures per simulated run, which set its length (100)"
    )
    parser.add_argument("--seeds", type=int, default=20, help="simulated runs per mean (20)")
    parser.add_argument("--plot", metavar="FILE", help="also plot goodput by interval, as PNG, SVG or PDF")
    parser.add_argument("--run", help="folder of a finished run, whose goodput is compared with the simulated one")
    arguments = parser.parse_args()
    for name in ("failures_per_node_day", "step_seconds", "restart_seconds", "failures", "seeds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} ({getattr(arguments, name):g}) must be above 0.")
    return arguments


def compare(run: str) -> None:
    """Print the measured and the simulated goodput of a finished run."""
    times, config = read_time_breakdown(run), load_config(f"{run}/config.yaml")
    found = replay(times, config.train.steps, config.checkpoint.interval)
    ratio = found.goodput / times.goodput
    print(f"{run}: {len(times.processes) - 1} failures, wall time {show_seconds(times.wall)}")
    print(f"measured goodput {times.goodput:.4f}, simulated {found.goodput:.4f}, ratio {ratio:.3f}")
    print(
        f"seconds: kept {times.seconds['kept']:.1f}, simulated {found.kept:.1f}; lost {times.seconds['lost']:.1f}, "
        f"simulated {found.lost:.1f}; start-up and down {times.seconds['start-up'] + times.seconds['down']:.1f}, "
        f"simulated {found.starting:.1f}; between steps {times.seconds['between']:.1f}, simulated {found.saving:.1f}"
    )


def count_steps(arguments: argparse.Namespace, costs: Costs, between: float) -> int:
    return max(1, round(arguments.failures * between / costs.step_seconds))


def advise(arguments: argparse.Namespace, costs: Costs) -> None:
    """Print the table of intervals, one line per cluster."""
    print(
        f"{arguments.failures_per_node_day:g} failures per node and day, steps of {costs.step_seconds:g} s, stalls of "
        f"{costs.save_seconds:g} s, {costs.write_seconds:g} s of writing, restarts of {costs.restart_seconds:g} s; "
        f"{arguments.seeds} runs of about {arguments.failures} failures\n"
    )
    print("nodes  between failures  Young (goodput)   Daly (goodput)    best interval   goodput")
    for nodes in arguments.nodes:
        between = seconds_between_failures(nodes, arguments.failures_per_node_day)
        steps, cells = count_steps(arguments, costs, between), []
        for rule in (first_order, higher_order):
            interval = min(steps, max(1, round(rule(costs.save_seconds, between) / costs.step_seconds)))
            goodput = mean_goodput(between, steps, interval, costs, arguments.seeds)
            cells.append(f"{interval:>6} ({goodput:.2%})")
        interval, goodput = best_interval(between, steps, costs, arguments.seeds)
        best = f"{interval:>5}, {show_seconds(interval * costs.step_seconds)}"
        print(f"{nodes:>5}  {show_seconds(between):>16}  {cells[0]:<16}  {cells[1]:<16}  {best:<14}  {goodput:.2%}")


def draw(arguments: argparse.Namespace, costs: Costs) -> None:
    """Plot goodput by interval, one curve per cluster."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    least = max(costs.step_seconds, costs.save_seconds, costs.write_seconds)
    seconds = [1.3**power for power in range(60) if least < 1.3**power < SECONDS_PER_DAY]
    intervals = list(dict.fromkeys(round(each / costs.step_seconds) for each in seconds))
    for nodes in arguments.nodes:
        between = seconds_between_failures(nodes, arguments.failures_per_node_day)
        steps = count_steps(arguments, costs, between)
        goodput = [mean_goodput(between, steps, interval, costs, arguments.seeds) for interval in intervals]
        axes.plot([each * costs.step_seconds / 60 for each in intervals], goodput, marker=".", label=f"{nodes} nodes")
    axes.set(xscale="log", xlabel="minutes between checkpoints", ylabel="goodput", ylim=(None, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.plot, dpi=150)
    print(f"\nwrote {arguments.plot}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.run:
        compare(arguments.run)
        return
    costs = Costs(
        step_seconds=arguments.step_seconds,
        save_seconds=arguments.save_seconds,
        write_seconds=arguments.write_seconds,
        restart_seconds=arguments.restart_seconds,
    )
    advise(arguments, costs)
    if arguments.plot:
        draw(arguments, costs)


if __name__ == "__main__":
    run_tool(main)
