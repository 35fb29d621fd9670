"""One call of tools/generate.py: load the model, retrieve documents, generate, write the results."""

from dataclasses import dataclass, field

from megatron_cm3leon.generation.generator import Generator
from megatron_cm3leon.generation.results import Results, check_output, written_results
from megatron_cm3leon.generation.retrieved import RetrievalOptions, retrieve_documents
from megatron_cm3leon.generation.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is generated, by which model, and where the results go."""

    task: Task
    model: str
    """Folder that tools/convert_checkpoint.py export wrote."""
    output: str | None = None
    """New folder for images and generated.json; None writes nothing, which only tasks of text allow."""
    options: dict = field(default_factory=dict)
    """The command's options, with `sampler`, as generated.json records them."""
    retrieval: RetrievalOptions = field(default_factory=RetrievalOptions)
    dtype: str = "fp32"
    """One of decoder.KINDS."""
    device: str = "auto"


def generate(request: Request) -> Results:
    """Generate what `request` asks for and write it to its output folder, which appears when it is complete.

    ValueError for input that cannot be used; nothing is at the output folder then.
    """
    if request.output is not None:
        check_output(request.output)
    task = request.task.load()
    generator = Generator.load(request.model, request.dtype, request.device)
    retrieved = retrieve_documents(request.retrieval, generator.codec, generator.training_documents, task.queries)
    with written_results(request.output, request.options) as results:
        task.generate(generator, retrieved, results)
    return results
