"""The Latents tab of TensorBoard: which runs there are, and its routes. torch is imported by the first request for one.

TensorBoard finds the plugin by the package's entry point `tensorboard_plugins`. Each route answers with JSON or a file; what
goes wrong is a sentence, {"error": ...} with status 400, and never reaches the other tabs.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug.wrappers import Request

from vae.errors import VAEError

if TYPE_CHECKING:
    from vae.latents.session import Session

MOST_BYTES = 10 * 2**20  # of a request's body
MOST_FOLDERS = 20_000  # looked at for runs
MOST_RUNS = 1000
OPEN = 4  # models kept in memory

log = logging.getLogger(__name__)


class LatentsPlugin(base_plugin.TBPlugin):
    """Routes of the tab, each below data/plugin/latents/."""

    plugin_name = "latents"

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self.roots = _roots(context)
        self._sessions: OrderedDict[tuple[Path, int], Session] = OrderedDict()
        self._lock = threading.Lock()  # one model at a time: requests come in threads

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        answers = {
            "/index.js": lambda request: (_static("index.js"), "application/javascript"),
            "/runs": lambda request: {"runs": list(islice(self._runs(), MOST_RUNS))},
            "/summary": self._of_session(lambda session, asked: session.summary()),
            "/thumbnails": self._of_session(lambda session, asked: (session.thumbnails(), "image/png")),
            "/plane": self._of_session(lambda session, asked: session.plane(asked.get("axes"), asked.get("prior"))),
            "/point": self._of_session(lambda session, asked: session.point(asked.get("index"))),
            "/draw": self._of_session(
                lambda session, asked: session.draw(
                    asked.get("seed", 0), asked.get("temperature", 1), asked.get("prior")
                )
            ),
            "/decode": self._of_session(lambda session, asked: session.decode(asked.get("z"), asked.get("y"))),
            "/walk": self._of_session(
                lambda session, asked: session.walk(
                    asked.get("a"), asked.get("b"), asked.get("steps", 9), asked.get("path", "straight"), asked.get("y")
                )
            ),
            "/file": self._of_session(
                lambda session, asked: session.file(asked.get("z"), asked.get("y"), asked.get("format"))
            ),
            "/encode": self._encode,
        }
        return {route: _caught(answer) for route, answer in answers.items()}

    def is_active(self) -> bool:
        return next(self._runs(), None) is not None

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Latents", disable_reload=True)

    # --- runs -------------------------------------------------------------------------------------------------------

    def _runs(self) -> Iterator[str]:
        """Names of the logdir's folders that hold a config and the weights that were tested. No link is followed."""
        left = MOST_FOLDERS
        for name, root in self.roots.items():
            for folder, below, files in os.walk(root):
                left -= 1
                if left < 0:
                    return
                if "config.yaml" in files and os.path.isfile(os.path.join(folder, "checkpoints", "best.ckpt")):
                    yield name + Path(folder).relative_to(root).as_posix()
                    below.clear()
                below.sort()

    def _folder(self, run: Any) -> Path:
        """A run's folder. Raises VAEError for one that is not in the logdir, by whatever way its name leads out of it."""
        if not isinstance(run, str) or "\0" in run:
            raise VAEError("Choose a run.")
        for name, root in self.roots.items():
            if run.startswith(name):
                folder = (root / run.removeprefix(name)).resolve()
                if folder.is_relative_to(root) and (folder / "checkpoints" / "best.ckpt").resolve().is_relative_to(
                    root
                ):
                    return folder
        raise VAEError(f"{run} is not a run in TensorBoard's logdir.")

    def _session(self, run: Any) -> Session:
        from vae.latents.session import Session  # imports torch

        folder = self._folder(run)
        try:
            key = folder, (folder / "checkpoints" / "best.ckpt").stat().st_mtime_ns
        except OSError as error:
            raise VAEError(f"{run} has no checkpoints/best.ckpt: train it first.") from error
        session = self._sessions.pop(key, None) or Session(folder)
        self._sessions[key] = session
        while len(self._sessions) > OPEN:
            self._sessions.popitem(last=False)
        return session

    # --- answers ----------------------------------------------------------------------------------------------------

    def _of_session(self, answer: Callable[[Session, dict[str, Any]], Any]) -> Callable[[Request], Any]:
        """A route that is asked by JSON in the body, or by a query where that says enough, and needs the run's model."""

        def route(request: Request) -> Any:
            asked = _json(request) if request.method == "POST" else dict(request.args)
            with self._lock:
                return answer(self._session(asked.get("run")), asked)

        return route

    def _encode(self, request: Request) -> Any:
        """The image is the body, so that it travels as it is."""
        body, y = _body(request), request.args.get("y", type=int)
        with self._lock:
            return self._session(request.args.get("run")).encode(body, y)


def _roots(context: base_plugin.TBContext) -> dict[str, Path]:
    """Where runs are looked for, by what their names begin with: --logdir, or the named folders of --logdir_spec."""
    spec = getattr(context.flags, "logdir_spec", "") if context.flags is not None else ""
    if context.logdir or not spec:
        return {"": Path(context.logdir).expanduser().resolve()} if context.logdir else {}
    named = (part.rpartition(":") for part in spec.split(","))
    return {f"{name or path}/": Path(path).expanduser().resolve() for name, _, path in named}


def _caught(answer: Callable[[Request], Any]) -> Callable[..., Any]:
    """`answer` as a WSGI application: a dict is sent as JSON, (bytes, type) as a file, an error as a sentence."""

    @Request.application
    def application(request: Request) -> Any:
        try:
            found = answer(request)
            content, kind = (found, "application/json") if isinstance(found, dict) else found
            return http_util.Respond(request, content, kind)
        except VAEError as error:
            sentence = str(error)
        except Exception as error:
            log.exception("The Latents tab could not answer.")
            sentence = f"This could not be done ({type(error).__name__}: {error})."
        return http_util.Respond(request, {"error": sentence}, "application/json", code=400)

    return application


def _static(name: str) -> bytes:
    return (Path(__file__).parent / "static" / name).read_bytes()


def _body(request: Request) -> bytes:
    if request.content_length is None or request.content_length > MOST_BYTES:
        raise VAEError(f"A request has at most {MOST_BYTES // 2**20} MB.")
    return request.get_data(cache=False)


def _json(request: Request) -> dict[str, Any]:
    try:
        asked = json.loads(_body(request))
    except (ValueError, RecursionError) as error:
        raise VAEError("The request is not JSON.") from error
    if not isinstance(asked, dict):
        raise VAEError("The request is not a JSON object.")
    return asked
