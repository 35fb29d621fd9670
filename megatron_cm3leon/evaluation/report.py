"""The report: one self-contained HTML page, from a plain structure and a folder of images.

    build_report(content, images)        content: collected by assemble.py; any part may be missing

The page loads nothing: images are data URIs, charts are inline SVG, the style is in its head. It can be printed and
follows the reader's choice of light or dark.
"""

import base64
from html import escape
from pathlib import Path

from megatron_cm3leon.evaluation.charts import draw_loss_curves, split_attempts

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #59626d; --line: #d9dee4;
  --good: #17692f; --bad: #b3261e; --accent: #2f6fd0; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1e2228; --ink: #e7eaee; --soft: #a3adb8;
  --line: #3a424c; --good: #6fcf8b; --bad: #ff8a80; --accent: #7fb0ff; } }
@media (max-width: 34rem) { .scroll table { font-size: .78rem; } .scroll td.n, .scroll th.n { padding: .3rem .2rem; }
  main { padding: 1.2rem .9rem 3rem; } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --good: #17692f;
  --bad: #b3261e; } body { font-size: 10.5pt; } section, .card, figure, tr { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: .3rem 0 1rem; }
.soft, figcaption, .note { color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.4rem 0; }
.number { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem; }
.number b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.number span { display: block; font-size: .87rem; color: var(--soft); line-height: 1.35; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .9rem; }
.card > p { margin: 0 0 .6rem; line-height: 1.4; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .6rem; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .3rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; padding: .3rem .5rem; }
.gap { margin-top: 1.4rem; }
.card table { width: 100%; table-layout: fixed; font-size: .85rem; margin-top: .4rem; }
.card th { font-weight: 400; } .card thead { position: absolute; clip-path: inset(50%); }
.card th, .card td { padding: .15rem .5rem .15rem 0; }
.card tr:last-child > * { border-bottom: 0; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.chart svg { width: 100%; height: auto; max-width: 46rem; display: block; }
"""


def build_report(content: dict, images: str | Path) -> str:
    """HTML of the report; `images` is the folder that the image paths in `content` are relative to."""
    page = _Page(content, Path(images))
    parts = [
        page.numbers(),
        page.examples(),
        page.accuracy(),
        page.captions(),
        page.infilling(),
        page.retrieval(),
        page.reconstructions(),
        page.curves(),
        page.stages(),
    ]
    title = escape(content.get("title", "Report"))
    subtitle = f'<p class="soft">{escape(content["subtitle"])}</p>' if content.get("subtitle") else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{subtitle}\n" + "\n".join(filter(None, parts)) + "\n</main>\n</body>\n</html>\n"
    )


def percent(share: float | None) -> str:
    """A share as a percentage without decimals; a dash if it was not measured."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _name_setting(row: dict) -> str:
    """Description of a row of the sweep."""
    return f"guidance {row['guidance']:g}, {'with' if row['retrieval'] else 'without'} retrieved documents"


class _Page:
    """HTML of the sections of the report; a section without content is an empty string."""

    def __init__(self, content: dict, images: Path) -> None:
        self.content, self.images = content, images
        self.figures = content.get("figures", {})

    def image(self, path: str, alt: str, label: str = "") -> str:
        """A figure whose image is a data URI."""
        data = base64.b64encode((self.images / path).read_bytes()).decode()
        caption = f"<figcaption>{label}</figcaption>" if label else ""
        return f'<figure><img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">{caption}</figure>'

    def numbers(self) -> str:
        boxes = [
            f'<div class="number"><b>{escape(str(one["value"]))}</b><span>{escape(one["label"])}</span></div>'
            for one in self.content.get("numbers", [])
        ]
        return f'<div class="numbers">{"".join(boxes)}</div>' if boxes else ""

    def curves(self) -> str:
        records = self.content.get("curves")
        if not records:
            return ""
        attempts = len(split_attempts(records))
        first, last = records[0], records[-1]
        summary = (
            f"{f'{attempts} attempts' if attempts > 1 else 'One attempt'}, steps {first['step']} to {last['step']}"
        )
        alt = f"Loss by step: from {first['loss']:.2f} to {last['loss']:.2f} over all tokens."
        chart = draw_loss_curves(records).replace("<svg", f'<svg role="img" aria-label="{escape(alt, quote=True)}"', 1)
        note = "Thin lines are single steps, thick lines their moving average"
        if any(key.startswith("validation_") for one in records for key in one):
            note += "; points are held-out documents"
        return f'<section><h2>Training</h2><p>{summary}. {note}.</p><div class="chart">{chart}</div></section>'

    def accuracy(self) -> str:
        rows = self.content.get("accuracy") or []
        sweep = self.content.get("sweep") or []
        if not rows:
            return self._clip_sweep(sweep)
        names = sorted(rows[0]["shares"], key=lambda name: name != "all")  # the total first
        text = self._share_table("Images", names, [(one["name"], one["shares"]) for one in rows])
        if sweep:
            lines = [(_name_setting(one), one["accuracy"]) for one in sweep]
            text += '<p class="gap">Guidance and retrieval were chosen on other held-out captions:</p>'
            text += self._share_table("Sweep", names, lines)
        about = escape(self.content.get("accuracy_note", "Share of images that show what their caption says."))
        return f"<section><h2>Does the image show its caption?</h2><p>{about}</p>{text}</section>"

    @staticmethod
    def _clip_sweep(sweep: list) -> str:
        """The CLIP scores by which guidance and retrieval were chosen without a checker."""
        if not sweep:
            return ""
        lines = "".join(
            f'<tr><th scope="row">{escape(_name_setting(one))}</th><td class="n">{one["clip_score"]:.3f}</td></tr>'
            for one in sweep
        )
        return (
            "<section><h2>Choice of guidance and retrieval</h2><p>By the mean CLIP score of images generated for other "
            'held-out captions.</p><div class="scroll"><table><tr><th scope="col">setting</th>'
            f'<th class="n" scope="col">CLIP score</th></tr>{lines}</table></div></section>'
        )

    @staticmethod
    def _share_table(first: str, names: list[str], rows: list) -> str:
        head = "".join(f'<th class="n" scope="col">{escape(name)}</th>' for name in names)
        body = "".join(
            f'<tr><th scope="row">{escape(label)}</th>'
            + "".join(f'<td class="n">{percent(shares.get(name))}</td>' for name in names)
            + "</tr>"
            for label, shares in rows
        )
        return f'<div class="scroll"><table><tr><th scope="col">{first}</th>{head}</tr>{body}</table></div>'

    def examples(self) -> str:
        examples = self.content.get("examples")
        if not examples:
            return ""
        guidance = self.figures.get("guidance", 1)
        cards = []
        for one in examples:
            caption = one["caption"]
            row = [
                self.image(one["original"], f"Held-out image of: {caption}", "held-out"),
                self.image(one["plain"], f"Generated without guidance: {caption}", "guidance 1"),
            ]
            if guidance != 1:
                alt = f"Generated with guidance {guidance:g}: {caption}"
                row.append(self.image(one["guided"], alt, f"guidance {guidance:g}"))
            cards.append(
                f'<div class="card"><p>{escape(caption)}</p><div class="row">{"".join(row)}</div>'
                f"{self._verdicts(one, guidance)}</div>"
            )
        return (
            "<section><h2>Held-out captions</h2><p>A random sample. The model was not trained on the "
            f'held-out images.</p><div class="cards">{"".join(cards)}</div></section>'
        )

    @staticmethod
    def _verdicts(one: dict, guidance: float) -> str:
        """Whether each attribute is correct, in both images."""
        if "plain_judged" not in one:
            return ""
        shown = ["plain_judged"] + (["guided_judged"] if guidance != 1 else [])

        def verdict(expected: object, found: object, correct: bool) -> str:
            if correct:
                return '<td class="good">✓</td>'
            return f'<td class="bad">✗ {escape(str(found))}</td>'

        lines = "".join(
            f'<tr><th scope="row">{escape(str(one[shown[0]][name][0]))}</th>'
            + "".join(verdict(*one[key][name]) for key in shown)
            + "</tr>"
            for name in one[shown[0]]
        )
        heads = "".join(
            f'<th scope="col">{label}</th>' for label in ["guidance 1", f"guidance {guidance:g}"][: len(shown)]
        )
        # The images above are the headings of the columns; these words are for screen readers.
        return f'<table><thead><tr><th scope="col">expected</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'

    def captions(self) -> str:
        captions = self.content.get("captions")
        if not captions:
            return ""
        cards = []
        for one in captions:
            mark = '<span class="good">✓</span>' if one["right"] else '<span class="bad">✗</span>'
            label = f"{mark} {escape(one['made']) or '<i>no text</i>'}"
            cards.append(f'<div class="card">{self.image(one["picture"], "Image of: " + one["caption"], label)}</div>')
        share = percent(self.figures.get("caption_accuracy"))
        return (
            f"<section><h2>Captions of held-out images</h2><p>{share} of them are correct.</p>"
            f'<div class="cards" style="grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr))">'
            f"{''.join(cards)}</div></section>"
        )

    def infilling(self) -> str:
        infilling = self.content.get("infilling")
        if not infilling:
            return ""
        cards = []
        for one in infilling:
            caption = one["caption"]
            row = [
                self.image(one["before"], f"Before: {caption}", "before"),
                self.image(one["masked"], "The part that is generated anew, checkered", "masked"),
                self.image(one["after"], f"Infilled: {caption}", "infilled"),
            ]
            cards.append(f'<div class="card"><p>{escape(caption)}</p><div class="row">{"".join(row)}</div></div>')
        kept = sum(one["kept_codes"] for one in infilling)
        others = sum(one["other_codes"] for one in infilling)
        return (
            "<section><h2>Infilling</h2><p>The masked part is generated anew from the caption and the rest of the "
            f"image; {kept} of the {others} other image tokens are unchanged.</p>"
            f'<div class="cards">{"".join(cards)}</div></section>'
        )

    def retrieval(self) -> str:
        queries = self.content.get("retrieval")
        if not queries:
            return ""
        cards = []
        for one in queries:
            row = [self.image(one["picture"], f"Query: {one['caption']}", "query")]
            for neighbor in one["neighbours"]:
                label = f"{neighbor['score']:.2f} · {escape(neighbor['caption'] or '')}"
                row.append(self.image(neighbor["picture"], f"Retrieved: {neighbor['caption']}", label))
            cards.append(
                f'<div class="card"><p>{escape(one["caption"])}</p><div class="row">{"".join(row)}</div></div>'
            )
        note = "Documents of the memory bank that a caption retrieves, with their scores; those above 0.9 are not used."
        with_, without = self.figures.get("loss_with_retrieval"), self.figures.get("loss_without_retrieval")
        if with_ is not None and without is not None:
            note += (
                f" Loss on held-out documents: {with_:.3f} with retrieved documents in context, {without:.3f} without."
            )
        return f'<section><h2>Retrieval</h2><p>{note}</p><div class="cards">{"".join(cards)}</div></section>'

    def reconstructions(self) -> str:
        rows = self.content.get("reconstructions")
        if not rows:
            return ""
        cards = []
        for one in rows:
            pair = self.image(one["original"], f"Original: {one['caption']}", "original")
            label = f"reconstructed, {one['psnr_db']:.1f} dB"
            pair += self.image(one["reconstruction"], f"Reconstruction: {one['caption']}", label)
            cards.append(f'<div class="card"><div class="row">{pair}</div></div>')
        psnr = self.figures.get("image_psnr_db")
        return (
            "<section><h2>The image tokenizer</h2><p>Held-out images and their reconstructions from the image tokens"
            f"{f': {psnr:.1f} dB PSNR on average' if psnr is not None else ''}. Generated images consist of the same "
            "tokens.</p>"
            f'<div class="cards" style="grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr))">'
            f"{''.join(cards)}</div></section>"
        )

    def stages(self) -> str:
        stages = self.content.get("stage_seconds")
        if not stages:
            return ""
        rows = "".join(
            f'<tr><th scope="row">{escape(name)}</th><td class="n">{seconds:.1f} s</td></tr>'
            for name, seconds in stages.items()
        )
        total = sum(stages.values())
        rows += f'<tr><th scope="row">all</th><td class="n">{total:.1f} s ({total / 60:.1f} min)</td></tr>'
        return (
            '<section><h2>Time</h2><div class="scroll"><table><tr><th scope="col">stage</th>'
            f'<th class="n" scope="col">time</th></tr>{rows}</table></div></section>'
        )
