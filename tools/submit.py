"""Submit work to SLURM: a training run, or everything from raw pairs to one.

submit.py train config.yaml data.shards=shards/ --nodes 4 --gpus-per-node 8 --time 24:00:00
submit.py pipeline pipeline.yaml

Each writes its batch scripts and submits them; --print shows them and writes nothing. Defaults of your site come from
a YAML file: --site, else $MEGATRON_CM3LEON_SITE, else ~/.config/megatron_cm3leon/site.yaml (docs/slurm.md).
"""

import argparse

from megatron_cm3leon.common.cli import HelpFormatter, run_tool, user_path
from megatron_cm3leon.slurm.pipeline import load_pipeline, plan_pipeline, show_plan, submit_plan
from megatron_cm3leon.slurm.script import LAUNCHERS
from megatron_cm3leon.slurm.site import RUNTIMES, Site, check_site, load_site
from megatron_cm3leon.slurm.training_job import TrainingJob, prepare_training, submit_training


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    form = {"formatter_class": HelpFormatter}
    train = commands.add_parser("train", help="submit a training run", **form)
    train.add_argument("config", type=user_path, help="YAML file of the run")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the YAML's")
    train.add_argument("--nodes", type=int, required=True, help="nodes")
    train.add_argument("--gpus-per-node", type=int, default=0, help="GPUs of a node, one rank each")
    train.add_argument("--ranks-per-node", type=int, default=0, help="ranks of a node without GPUs")
    train.add_argument("--time", required=True, help="time limit of one start, such as 24:00:00 or 2-00:00:00")
    train.add_argument("--lead", type=int, help="seconds before it at which the run saves (default: as measured)")
    train.add_argument("--launcher", choices=LAUNCHERS, default="srun", help="srun: a task a rank; torchrun: a node")
    train.add_argument("--name", default="", help="name of the job (default: the run folder's)")
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="field of the model or the stream that a resumed run may change; repeatable",
    )
    add_site_options(train)
    pipeline = commands.add_parser("pipeline", help="submit preprocessing, index and training, chained", **form)
    pipeline.add_argument("plan", type=user_path, help="YAML file of the pipeline (examples/slurm/pipeline.yaml)")
    pipeline.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields that replace the YAML's")
    add_site_options(pipeline)
    # argparse takes the positional arguments up to the first option; overrides may also stand behind it.
    options, more = parser.parse_known_args(arguments)
    unknown = [word for word in more if word.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += more
    return options


def add_site_options(parser: argparse.ArgumentParser) -> None:
    """Options that replace what the site's file says."""
    parser.add_argument("--print", action="store_true", help="show what would be submitted; write nothing")
    parser.add_argument("--site", type=user_path, default="", help="YAML file of the site's defaults")
    group = parser.add_argument_group("instead of the site's defaults")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", help=f"{name} of the job")
    group.add_argument("--memory", "--mem", help="memory of a node, such as 400G; 0 is all of it")
    group.add_argument("--cpus-per-rank", type=int, help="CPU cores of a training rank")
    group.add_argument("--container", type=user_path, metavar="IMAGE", help="image in which the commands run")
    group.add_argument("--container-runtime", choices=RUNTIMES, help="what runs it")
    group.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the job, NCCL's say; repeatable"
    )


def open_site(options: argparse.Namespace) -> Site:
    """The site's defaults with the command line's values in their place."""
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


def main() -> int:
    options = parse_arguments()
    site = open_site(options)
    if options.command == "train":
        names = ("config", "overrides", "nodes", "gpus_per_node", "ranks_per_node", "time", "lead", "launcher", "name")
        job = TrainingJob(**{name: getattr(options, name) for name in names}, changes=options.allow_change, site=site)
        prepared = prepare_training(job)
        if options.print:
            print(prepared.text, end="")
        else:
            job = submit_training(prepared)
            print(f"job {job}: {prepared.log.with_name(prepared.log.name.replace('%j', str(job)))}")
        return 0
    plan = plan_pipeline(load_pipeline(options.plan, options.overrides), site)
    if options.print:
        print(show_plan(plan), end="")
        return 0
    for line in submit_plan(plan):
        print(line)
    return 0


if __name__ == "__main__":
    run_tool(main)
