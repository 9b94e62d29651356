"""The page: Gradio's components, and what happens when they are used. What that does is in `handlers`, what is shown in
`views`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from restuning.app import views
from restuning.app.handlers import Handlers
from restuning.app.home import Home
from restuning.app.recipes import BACKBONES
from restuning.app.take import finished, take
from restuning.app.views import REFUSED, View
from restuning.errors import MissingExtra

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtra("gradio", "app") from error

FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
HEAD = (
    '<header class="rt-head"><svg viewBox="0 0 42 42" aria-hidden="true"><rect width="42" height="42" rx="11" '
    'fill="#1f4fd1"/><path d="M8 27h26" stroke="#fff" stroke-width="3.2" stroke-linecap="round"/><path d="M11 27c3-17 '
    '17-17 20 0" fill="none" stroke="#9fc0ff" stroke-width="3.2" stroke-linecap="round"/></svg>'
    "<div><h1>restuning</h1>"
    "<p>From a folder of pictures, or a table of texts, to a task. Nothing leaves this machine.</p></div></header>"
)
KINDS = [
    ("Mistakes", "mistakes"),
    ("Labels that may be wrong", "wrong"),
    ("Confusion", "confusion"),
    ("Map", "map"),
]
ADDRESS = (
    "(name) => { const at = new URL(location); at.searchParams.set('project', name || ''); "
    "history.replaceState(null, '', at); return name }"
)
"""The project is in the page's address, so that a reload, or another tab, has it."""


def style() -> dict[str, Any]:
    """What `launch` and `gradio.mount_gradio_app` are told of the page's looks; without fonts of other hosts."""
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=["monospace"])
    return {"theme": theme, "css": (views.ASSETS / "page.css").read_text(encoding="utf-8")}


def build(home: Home, local: bool = True) -> Any:
    """The page as `gradio.Blocks`: `launch(**style())` it, or mount it on a server.

    Args:
        home: the projects.
        local: as `Handlers` has it.
    """
    on = Handlers(home, local)
    events, the_map = ((views.ASSETS / name).read_text(encoding="utf-8") for name in ("events.js", "map.js"))

    def html(js: str | None = events, **more: Any) -> Any:
        return gr.HTML(js_on_load=js, **more)

    with gr.Blocks(title="restuning", analytics_enabled=False) as blocks:
        pictures_view, look_view = gr.State(View()), gr.State(View("mistakes"))
        html(
            None,
            value=HEAD,
        )
        with gr.Row(elem_id="head"):
            project = gr.Dropdown(label="Project", choices=home.names(), scale=3, elem_id="project")
            new_name = gr.Textbox(label="New project", placeholder="a name", scale=2, elem_id="new-name")
            make = gr.Button("Make it", scale=1, elem_id="make")
            second = gr.Button("Second task on the same data", scale=1, visible=False, elem_id="second")
        summary = html(None, elem_id="summary")
        with gr.Tabs():
            with gr.Tab("Data", id="data"):
                with gr.Row(elem_id="given"):
                    label = gr.Textbox(
                        label="Class of what is added", placeholder="empty: folders of a zip, or none", elem_id="label"
                    )
                    folder = gr.Textbox(
                        label="A folder of this machine",
                        placeholder="/path/to/folder",
                        max_lines=1,
                        visible=local,
                        elem_id="folder",
                    )
                    read = gr.Button("Copy what is in it", visible=local, elem_id="read")
                files = gr.File(
                    label="Pictures, a zip of folders, or a csv of texts",
                    file_count="multiple",
                    type="filepath",
                    height=140,
                    elem_id="files",
                )
                told = html(None, elem_id="told")
                checks = html(elem_id="checks")
                pictures = html(elem_id="pictures-gallery")
            with gr.Tab("Train", id="train"):
                with gr.Row(elem_id="train-row"):
                    backbone = gr.Dropdown(
                        label="Backbone",
                        choices=[(views.priced(name), name) for name in BACKBONES],
                        value=BACKBONES[0],
                        allow_custom_value=True,
                        elem_id="backbone",
                    )
                    weights = gr.Textbox(label="Its weights", placeholder="a file; empty: its own", elem_id="weights")
                with gr.Accordion("Settings", open=False):
                    epochs = gr.Slider(0, 100, 0, step=1, label="Epochs (0: each method's own)", elem_id="epochs")
                    lr = gr.Slider(0, 0.1, 0, step=0.001, label="Learning rate (0: each method's own)", elem_id="lr")
                with gr.Row(elem_id="go-row"):
                    go = gr.Button("Compute features and train", variant="primary", elem_id="go")
                    stop = gr.Button("Cancel", elem_id="stop")
                progress = html(None, elem_id="progress")
                scores = html(elem_id="scores")
                with gr.Accordion("Tune inside the backbone", open=False, elem_id="inside"):
                    inside_told = html(None, elem_id="inside-told")
                    inside_epochs = gr.Slider(1, 100, 20, step=1, label="Epochs of it", elem_id="inside-epochs")
                    with gr.Row():
                        inside_go = gr.Button("Start", elem_id="inside-go")
                        inside_stop = gr.Button("Stop", elem_id="inside-stop")
                    ticking = gr.Timer(2, active=False)
            with gr.Tab("Look", id="look"):
                what = gr.Radio(
                    KINDS,
                    value="mistakes", label="What to look at", elem_id="what",
                )  # fmt: skip
                changed = html(None, elem_id="changed")
                matrix = html(elem_id="matrix")
                drawn = html(the_map, elem_id="map")
                looked = html(elem_id="look-gallery")
            with gr.Tab("Try", id="try"), gr.Row(elem_id="tried"):
                image = gr.Image(
                    label="A picture: a file, the clipboard or the camera",
                    type="filepath",
                    sources=["upload", "clipboard", "webcam"],
                    height=320,
                    elem_id="image",
                )
                text = gr.Textbox(
                    label="A text", placeholder="write one, and press Enter", lines=4, max_lines=12, submit_btn="Ask",
                    visible=False, elem_id="text",
                )  # fmt: skip
                answered = html(None, value=views.answers([]), elem_id="answers")
            with gr.Tab("Take away", id="take"):
                took = html(None, elem_id="took")
                with gr.Row(elem_id="packing"):
                    pack = gr.Button("The adapter as a zip", elem_id="pack")
                    zipped = gr.DownloadButton("Download it", visible=False, elem_id="zipped")
                    onnx = gr.Button("Export for onnxruntime", elem_id="onnx")
                    graph = gr.Button("Export for torch.export", elem_id="graph")
                with (
                    gr.Accordion("Push to the hub", open=False, visible=local, elem_id="hub"),
                    gr.Row(elem_id="pushing"),
                ):
                    repo = gr.Textbox(
                        label="Repository", placeholder="owner/name", max_lines=1, scale=3, elem_id="repo"
                    )
                    private = gr.Checkbox(True, label="private", scale=1, elem_id="private")
                    push = gr.Button("Push", scale=1, elem_id="push")
                taken = html(None, elem_id="taken")

        above_and_below = [matrix, drawn, looked, look_view, changed]
        everything = [summary, checks, pictures, scores, looked, taken]
        tuned = [inside_told, ticking]
        all_tuned = [*tuned, inside_epochs]

        def load(request: gr.Request) -> tuple[Any, ...]:
            names = home.names()
            asked = request.query_params.get("project", "")
            name = asked if asked in names else (names[0] if names and not asked else "")
            shown = (gr.Dropdown(choices=names, value=name or None), on.backbone(name))
            return (*shown, *read_by(name), gr.Button(visible=bool(name)), *last_tuned(name), *on.opened(name))

        def read_by(name: str) -> tuple[Any, Any]:
            """What is tried: a picture or a text."""
            texts = on.kind(name) == "texts"
            return gr.Image(visible=not texts), gr.Textbox(visible=texts)

        def tuning(name: str, epochs: float, act: str = "") -> tuple[Any, Any]:
            told, running = on.inside(name, act, epochs) if name else ("", False)
            return told, gr.Timer(active=running)

        def last_tuned(name: str) -> tuple[Any, ...]:
            """With the epochs of the project's last run, so that Start goes on with it."""
            epochs = on.epochs_inside(name) or inside_epochs.value
            return *tuning(name, epochs), epochs

        def opened(name: str) -> tuple[Any, ...]:
            return (
                *on.opened(name),
                on.backbone(name),
                *read_by(name),
                gr.Button(visible=bool(name)),
                *last_tuned(name),
                "",
                "",
                "",
                views.answers([]),
                View(),
                View("mistakes"),
                "mistakes",
            )

        def make_project(name: str) -> tuple[Any, str, str]:
            try:
                made = home.new(name)
                return gr.Dropdown(choices=home.names(), value=made), "", ""
            except REFUSED as error:
                return gr.Dropdown(), name, views.refusal(error)

        def second_task(name: str, new: str) -> tuple[Any, str, str]:
            made, line = on.second(name, new)
            return gr.Dropdown(choices=home.names(), value=made or None), "", line

        def add(name: str, paths: list[str] | None, own: str, path: str = "") -> Iterator[tuple[Any, ...]]:
            line = ""
            for line in on.add(name, paths, own, path):
                yield (gr.skip(), line, *[gr.skip()] * 6)
            yield (None, line, *on.opened(name, "summary", "checks", "items"), on.backbone(name), *read_by(name))

        def in_pictures(name: str, view: View, event: gr.EventData) -> tuple[Any, ...]:
            line, view = on.act(name, view, event._data)
            return (view, line, on.gallery(name, view), *on.opened(name, "summary", "checks"))

        def in_look(name: str, view: View, mode: str, event: gr.EventData) -> tuple[Any, ...]:
            data = event._data
            if data["act"] == "map":
                shown_map, refused = on.look(name, "map", str(data["what"]))
                view = replace(view, how=str(data["what"])) if shown_map else view
                return view, refused, gr.skip(), shown_map or gr.skip(), "", gr.skip(), gr.skip()
            line, view = on.act(name, view, data)
            above = on.look(name, mode, view.how)[0] if line else None
            confusion, around = (gr.skip() if above is None or mode != own else above for own in ("confusion", "map"))
            return view, line, confusion, around, on.gallery(name, view), *on.opened(name, "summary", "scores")

        def look(name: str, mode: str) -> tuple[Any, ...]:
            above, below = on.look(name, mode) if name else ("", "")
            view = View(mode if mode in ("mistakes", "wrong") else "mistakes")
            return (above if mode == "confusion" else "", above if mode == "map" else "", below, view, "")

        def use(name: str, event: gr.EventData) -> tuple[Any, ...]:
            line, _ = on.act(name, View(), event._data)
            try:
                finished(home.bench(name))
            except REFUSED as error:
                line = views.refusal(error)
            return (line, *on.opened(name, "summary", "scores", "looked", "taken"))

        def packed(name: str) -> tuple[Any, str]:
            path, line = on.packed(name)
            return gr.DownloadButton(value=path, visible=path is not None), line

        def finish(name: str) -> str:
            """The adapter anew, where labels have changed since it was written."""
            try:
                finished(home.bench(name))
                return take(home.bench(name))
            except REFUSED as error:
                return views.refusal(error)

        blocks.load(load, None, [project, backbone, image, text, second, *all_tuned, *everything])
        project.change(
            opened, project,
            [*everything, backbone, image, text, second, *all_tuned, told, took, progress, answered, pictures_view,
             look_view, what],
        )  # fmt: skip
        project.change(None, project, None, js=ADDRESS)
        gr.on([make.click, new_name.submit], make_project, new_name, [project, new_name, told])
        second.click(second_task, [project, new_name], [project, new_name, told])
        shown = [files, told, summary, checks, pictures, backbone, image, text]
        files.upload(add, [project, files, label], shown)
        read.click(add, [project, files, label, folder], shown)
        for part in (pictures, checks):
            labelled = part.click(
                in_pictures, [project, pictures_view], [pictures_view, told, pictures, summary, checks]
            )
            labelled.then(look, [project, what], above_and_below)
        running = go.click(on.train, [project, backbone, weights, epochs, lr], [progress, scores])
        running.then(
            lambda name: on.opened(name, "summary", "checks", "scores", "taken"), project,
            [summary, checks, scores, taken],
        )  # fmt: skip
        running.then(look, [project, what], above_and_below)
        stop.click(on.cancel, project, None, queue=False)
        scores.click(use, project, [progress, summary, scores, looked, taken])
        running.then(tuning, [project, inside_epochs], tuned)
        inside_epochs.input(tuning, [project, inside_epochs], tuned)
        ticking.tick(tuning, [project, inside_epochs], tuned)
        for part, act in ((inside_go, "start"), (inside_stop, "stop")):
            part.click(partial(tuning, act=act), [project, inside_epochs], tuned)
        what.change(look, [project, what], above_and_below)
        for part in (looked, matrix, drawn):
            part.click(
                in_look, [project, look_view, what],
                [look_view, changed, matrix, drawn, looked, summary, scores],
            ).then(finish, project, taken)  # fmt: skip
        image.change(on.ask, [project, image], answered)
        text.submit(lambda name, asked: on.ask(name, None, asked), [project, text], answered)
        pack.click(packed, project, [zipped, took])
        for part, format in ((onnx, "onnx"), (graph, "torch-export")):
            part.click(partial(on.export, format=format), project, took)
        push.click(on.push, [project, repo, private], took)
    return blocks
