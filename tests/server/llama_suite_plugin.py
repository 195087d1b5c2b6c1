"""A pytest plugin that runs llama.cpp's server tests, as they are, on another model and another server.

The tests were written for models that llama.cpp's CI downloads, most of them for one of 260 thousand parameters. This plugin

* starts every server on the one model file that PHD_SUITE_MODEL names, and downloads nothing;
* skips the cases that cannot run on that model (llama_suite_adapt.CANNOT_RUN says which and why);
* replaces the story model's words and token counts by those of SmolLM2 (llama_suite_adapt.ADAPTED).

llama_suite.py runs it and compares the outcomes with what is expected.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.assertion import rewrite

import llama_suite_adapt as adapt

# Assertions compiled with adapted constants must not be cached beside the tests, where another table would find them.
sys.dont_write_bytecode = True

_case = adapt.Adapted()  # how the case that runs is adapted


def case_id(nodeid: str) -> str:
    """The part of a node id that names the case, whatever the working directory: test_x.py::test_y[z]."""
    return nodeid.removeprefix("unit/")


def function_id(case: str) -> str:
    return case.split("[", 1)[0]


# ---- The model and the server ------------------------------------------------------------------------------------


def pytest_configure(config):
    utils = sys.modules["utils"]  # the suite's conftest.py has imported it; the tests, which copy its names, come later
    model = os.environ["PHD_SUITE_MODEL"]
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    port = int(os.environ["PHD_SUITE_PORT"]) + worker
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    start = utils.ServerProcess.start

    def start_on_model(self, *args, **kwargs):
        self.server_port = port
        self.offline = False
        if self.model_hf_repo or _case.model:
            self.model_file, self.model_hf_repo, self.model_hf_file = model, None, None
        self.jinja = self.jinja or _case.jinja
        if self.n_threads is None:
            self.n_threads = threads
        if self.server_embeddings and self.pooling is None:
            self.pooling = "last"  # an encoder has a pooling of its own, a decoder has none
        return start(self, *args, **kwargs)

    match_regex = utils.match_regex

    def match_text(regex: str, text: str) -> bool:
        return len(text) > 0 if _case.any_text else match_regex(regex, text)

    def popen(command, **kwargs):
        return subprocess.Popen(command + ["--ignore-eos"] if _case.endless else command, **kwargs)

    utils.ServerProcess.start = start_on_model
    utils.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": popen})
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # it would download every model
    utils.download_file = lambda url, output_file_path=None: model
    utils.match_regex = match_text


# ---- Adapted cases -------------------------------------------------------------------------------------------------


class _Expressions(ast.NodeTransformer):
    """Replaces expressions and remembers which ones it found."""

    def __init__(self, table: dict[str, str]):
        self.table = {ast.dump(ast.parse(old, mode="eval").body): (old, new) for old, new in table.items()}
        self.found = set()

    def visit(self, node):
        if isinstance(node, ast.expr) and (replaced := self.table.get(ast.dump(node))):
            self.found.add(replaced[0])
            return ast.copy_location(ast.parse(replaced[1], mode="eval").body, node)
        return self.generic_visit(node)


def adapt_module(tree: ast.Module, file: str) -> None:
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        adapted = adapt.ADAPTED.get(f"{file}::{function.name}")
        if adapted is None or not adapted.source:
            continue
        expressions = _Expressions(adapted.source)
        function.body = [expressions.visit(statement) for statement in function.body]
        missing = adapted.source.keys() - expressions.found
        if missing:
            raise ValueError(f"{file}::{function.name} has no {missing}: llama_suite_adapt.py does not fit this suite")
    ast.fix_missing_locations(tree)


_rewrite_asserts = rewrite.rewrite_asserts


def _adapt_and_rewrite(tree, source, module_path=None, config=None):
    adapt_module(tree, Path(module_path or "").name)
    _rewrite_asserts(tree, source, module_path, config)


rewrite.rewrite_asserts = _adapt_and_rewrite


def adapted(case: str) -> adapt.Adapted:
    return adapt.ADAPTED.get(case) or adapt.ADAPTED.get(function_id(case)) or adapt.Adapted()


def pytest_collection_modifyitems(config, items):
    known = set()
    for item in items:
        case = case_id(item.nodeid)
        known |= {case, function_id(case), function_id(case).split("::")[0]}
        params = item.callspec.params if hasattr(item, "callspec") else {}
        reason = adapt.cannot_run(case)
        if reason is None and (adapt.LARGE_MODEL_PARAMETER in params or function_id(case) in adapt.LARGE_MODELS):
            reason = "needs a model of 1 to 8 thousand million parameters"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
            continue
        new = adapted(case).params
        if new.keys() - params.keys():
            raise ValueError(f"{case} has no {new.keys() - params.keys()}: llama_suite_adapt.py does not fit this suite")
        params.update(new)
    unknown = (adapt.CANNOT_RUN.keys() | adapt.LARGE_MODELS | adapt.ADAPTED.keys()) - known
    if unknown and not config.option.keyword:
        raise ValueError(f"llama_suite_adapt.py does not fit this suite, which lacks {sorted(unknown)}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    global _case
    _case = adapted(case_id(item.nodeid))


# ---- Outcomes --------------------------------------------------------------------------------------------------------


def pytest_runtest_logreport(report):
    """Runs in the controlling process: one outcome a case, the first that is not a pass."""
    outcomes = _reports
    case = case_id(report.nodeid)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        outcomes[case] = "cannot run: " + reason.removeprefix("Skipped: ")
    elif report.failed:
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        outcomes.setdefault(case, "fail: unexplained: " + message.splitlines()[0][:200])
    elif report.when == "call":
        outcomes.setdefault(case, "pass")


_reports: dict = {}


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["PHD_SUITE_OUTCOMES"]).write_text(json.dumps(_reports, indent=0, sort_keys=True))
