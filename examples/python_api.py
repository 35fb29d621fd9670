"""The public API of megatron_cm3leon, on the output of examples/quickstart.sh; run it as a script or cell by cell.

python examples/python_api.py runs/quickstart
"""

# %% The configuration of a run
import sys
from pathlib import Path

import torch

import megatron_cm3leon as cm3

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
config = cm3.load_config(folder / "train/config.yaml", ["data.workers=0"])
cm3.validate_config(config, world_size=1)
print(f"{config.model.layers} layers of width {config.model.hidden_size}, sequences of {config.data.seq_length} tokens")

# %% Tokenized documents: a caption, <break>, and the codes of its image
corpus = cm3.open_shards(config.data.shards)
text = cm3.TextTokenizer.load(folder / "tokenizer/text.model")
images = cm3.ImageTokenizer.load(folder / "tokenizer/image")
vocabulary = cm3.Vocabulary.load(folder / "tokenizer")
document = corpus.read(0)
caption = text.decode(int(token) for token in document if vocabulary.is_text(token))
print(f"document 0 of {corpus.documents}: {caption!r} and {vocabulary.is_image(document).sum()} image tokens")

# %% The stream: sequence n is a function of the data, the settings, the seed and n
stream = cm3.build_stream(config)
sequence = stream.sequence(1000)
print(f"sequence 1000 begins with {sequence.tokens[:8].tolist()}; the stream is {stream.identity[:12]}")

# %% Micro-batches of one of two data-parallel ranks
sizes = {"micro_batch_size": config.train.micro_batch_size, "global_batch_size": config.train.global_batch_size}
with cm3.Loader(stream, rank=1, size=2, workers=0, **sizes) as loader:
    number, micro_batches = next(loader)
    print(f"batch {number}: {len(micro_batches)} micro-batches of {tuple(micro_batches[0].tokens.shape)} tokens")

# %% The trained model in plain PyTorch: its loss on one sequence
checkpoint = sorted((folder / "train/checkpoints").glob("step-*"))[-1]
model = cm3.load_reference_model(checkpoint)
ids = torch.from_numpy(sequence.tokens.astype("int64"))
[logits] = model(ids[None, :-1])
loss = torch.nn.functional.cross_entropy(logits, ids[1:])
print(f"mean loss of the tokens of sequence 1000: {loss:.3f}")

# %% Retrieve documents for a caption
retriever = cm3.Retriever.load(folder / "index/train")
[neighbors] = retriever.search(texts=["a large red circle"], k=2)
captions = corpus.metadata(["caption"])["caption"]
print("retrieved:", [captions[int(number)].as_py() for number in neighbors])

# %% Generate an image for a caption
generator = cm3.Generator.load(folder / "exported")
[generated] = generator.images(["a large red circle"], cm3.Sampling(guidance=1.5, seed=1))
generated.image.resize((256, 256), 0).save(folder / "python-api.png")
print(f"wrote {folder / 'python-api.png'}")
