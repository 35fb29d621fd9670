"""Submit SLURM jobs: a training run, or a chain of jobs from raw pairs to a training run.

submit.py train config.yaml data.shards=shards/ --nodes 4 --gpus-per-node 8 --time 24:00:00
submit.py pipeline pipeline.yaml

Each command writes its batch scripts and submits them; --print prints them and writes nothing. Defaults of your site
are in a YAML file: --site, else $MEGATRON_CM3LEON_SITE, else ~/.config/megatron_cm3leon/site.yaml (docs/slurm.md).
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.slurm.pipeline import build_chain, format_chain, submit_chain
from megatron_cm3leon.slurm.pipeline_config import load_pipeline
from megatron_cm3leon.slurm.script import LAUNCHERS
from megatron_cm3leon.slurm.site import RUNTIMES, Site, check_site, load_site
from megatron_cm3leon.slurm.training_job import TrainingJob, prepare_training, submit_training


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="submit a training run", formatter_class=HelpFormatter)
    train.add_argument("config", type=user_path, help="YAML file of the run")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that override the file")
    train.add_argument("--nodes", type=int, required=True, help="number of nodes")
    train.add_argument("--gpus-per-node", type=int, default=0, help="GPUs per node, one rank each")
    train.add_argument("--ranks-per-node", type=int, default=0, help="ranks per node without GPUs")
    train.add_argument("--time", required=True, help="time limit of one start, such as 24:00:00 or 2-00:00:00")
    train.add_argument(
        "--signal-time", type=int, help="seconds before the time limit at which the run saves (default: as measured)"
    )
    train.add_argument("--lead", dest="signal_time", type=int, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    train.add_argument(
        "--launcher", choices=LAUNCHERS, default="srun", help="srun: one task per rank; torchrun: one task per node"
    )
    train.add_argument("--name", default="", help="name of the job (default: name of the run folder)")
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="field of the model or the stream that a resumed run may change; repeatable",
    )
    add_site_options(train)
    pipeline = commands.add_parser(
        "pipeline", help="submit preprocessing, index and training jobs", formatter_class=HelpFormatter
    )
    pipeline.add_argument("plan", type=user_path, help="YAML file of the pipeline (examples/slurm/pipeline.yaml)")
    pipeline.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that override the file")
    add_site_options(pipeline)
    # argparse reads positional arguments only up to the first option; overrides may also come after it.
    options, more = parser.parse_known_args(arguments)
    unknown = [word for word in more if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += more
    return options


def add_site_options(parser: argparse.ArgumentParser) -> None:
    """Add options that override the site's file."""
    parser.add_argument("--print", action="store_true", help="print what would be submitted; write nothing")
    parser.add_argument("--site", type=user_path, default="", help="YAML file of the site's defaults")
    group = parser.add_argument_group("options that override the site's defaults")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", help=f"{name} of the job")
    group.add_argument("--memory", "--mem", help="memory per node, such as 400G; 0 is all of it")
    group.add_argument("--cpus-per-rank", type=int, help="CPU cores per training rank")
    group.add_argument("--container", type=user_path, metavar="IMAGE", help="container image for all commands")
    group.add_argument("--container-runtime", choices=RUNTIMES, help="program that runs the container")
    group.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of the job; repeatable"
    )


def build_site(options: argparse.Namespace) -> Site:
    """The site's defaults, overridden by the command line."""
    site = load_site(options.site)
    for name in ("partition", "account", "qos", "constraint", "memory", "cpus_per_rank"):
        if (value := getattr(options, name)) is not None:
            setattr(site, name, value)
    site.container.image = site.container.image if options.container is None else options.container
    site.container.runtime = options.container_runtime or site.container.runtime
    for text in options.env:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--env ({text}) must be NAME=VALUE, such as NCCL_DEBUG=INFO.")
        site.environment[name] = value
    check_site(site)
    return site


def train(options: argparse.Namespace, site: Site) -> None:
    """Print or submit a training job."""
    prepared = prepare_training(
        TrainingJob(
            config=options.config,
            overrides=options.overrides,
            nodes=options.nodes,
            gpus_per_node=options.gpus_per_node,
            ranks_per_node=options.ranks_per_node,
            time=options.time,
            signal_time=options.signal_time,
            launcher=options.launcher,
            name=options.name,
            changes=options.allow_change,
            site=site,
        )
    )
    if options.print:
        print(prepared.text, end="")
    else:
        job = submit_training(prepared)
        print(f"job {job}: {prepared.log.with_name(prepared.log.name.replace('%j', str(job)))}")


def main() -> int:
    options = parse_arguments()
    site = build_site(options)
    if options.command == "train":
        train(options, site)
        return 0
    chain = build_chain(load_pipeline(options.plan, options.overrides), site)
    if options.print:
        print(format_chain(chain), end="")
    else:
        for line in submit_chain(chain):
            print(line)
    return 0


if __name__ == "__main__":
    run_tool(main)
