"""The table of a mixture: what each source has, its share, and how often an epoch repeats it."""

from pathlib import Path

from megatron_cm3leon.config.loading import Config
from megatron_cm3leon.data.shards.reader import load_manifest
from megatron_cm3leon.data.stream.stream import plan_sources


def describe_mixture(config: Config) -> str:
    """The sources of a config as a table; "" if it has no data.sources. ValueError for a folder without shards.

    "ratio" is samples / documents in a mixture epoch, before and after the limits of data.mixture; with given weights
    a mixture epoch has as many samples as there are documents.
    """
    sources = config.data.sources
    if not sources:
        return ""
    documents = [load_manifest(Path(source.shards))["documents"] for source in sources]
    plan, total = plan_sources(config, documents), sum(documents)
    if plan is None:
        weights = [source.weight for source in sources]
        shares = [weight / sum(weights) for weight in weights]
        samples = [share * total for share in shares]
        before = after = [count / number for count, number in zip(samples, documents, strict=True)]
    else:
        shares, samples, before, after = plan.shares, plan.samples, plan.ratios, plan.limited
    width = max(len("source"), *(len(source.shards) for source in sources))
    lines = [f"{'source':{width}}  documents   share  ratio  limited  samples per epoch"]
    for source, number, share, first, last, count in zip(
        sources, documents, shares, before, after, samples, strict=True
    ):
        lines.append(f"{source.shards:{width}}  {number:9d}  {share:6.2%}  {first:5.2f}  {last:7.2f}  {count:17.0f}")
    lines.append(f"{'total':{width}}  {total:9d}  {sum(shares):6.0%}                  {sum(samples):17.0f}")
    if plan is not None:
        rounded = f"; their shares are rounded by less than {plan.error:.1e}" if plan.error else ""
        lines.append(f"the sources alternate in cycles of {sum(plan.weights)} samples{rounded}")
    return "\n".join(lines)
