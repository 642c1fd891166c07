"""Database migrations for Flask, by Alembic: ``flask db`` commands and Python calls.

For Flask-SQLAlchemy, Flask-SQLAlchemy-Lite and plain SQLAlchemy, in one module.

    from flask_alembic import Alembic

    alembic = Alembic(app)
    with app.app_context():
        alembic.revision("add users")
        alembic.upgrade()
"""

from __future__ import annotations

import collections.abc as cabc
import copy
import importlib.util
import inspect
import io
import logging
import os
import re
import shutil
import sys
import threading
import time
import traceback
from contextlib import ExitStack
from contextlib import contextmanager
from contextlib import redirect_stdout
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from functools import partial
from functools import update_wrapper
from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple
from typing import TypeAlias
from typing import TypedDict
from typing import TypeVar
from typing import Unpack

import click
import sqlalchemy as sa
from flask import Flask
from flask import current_app
from flask import g
from flask.cli import AppGroup
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy.util import concurrency

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.environment import EnvironmentContext
    from alembic.migration import MigrationContext
    from alembic.operations import MigrationScript
    from alembic.operations import Operations
    from alembic.script import Script
    from alembic.script import ScriptDirectory
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "Alembic",
    "DatabaseStatus",
    "RunOptions",
    "cli",
    "FlaskAlembicError",
    "MigrationLockTimeout",
]

# -- Types and constants ---------------------------------------------------------------

_R = TypeVar("_R")
_Ids: TypeAlias = "tuple[str, ...]"
_Names: TypeAlias = "cabc.Iterable[str]"
_Options: TypeAlias = "dict[str, Any]"
#: What a context manager's function returns.
_Block: TypeAlias = "cabc.Generator[None]"
StepFunction: TypeAlias = "cabc.Callable[[Any, MigrationContext], cabc.Iterable[Any]]"
Revisions: TypeAlias = "tuple[Script, ...]"
#: One revision or several: ids, unique prefixes, scripts, symbols (``users@head``).
RevisionTarget: TypeAlias = "str | int | Script | cabc.Sequence[str | Script]"
DatabaseNames: TypeAlias = "str | cabc.Sequence[str] | None"
XArguments: TypeAlias = "cabc.Mapping[str, Any] | cabc.Sequence[str] | str | None"
MetadataOption: TypeAlias = "sa.MetaData | cabc.Sequence[sa.MetaData]"
EngineOption: TypeAlias = "sa.Engine | AsyncEngine"
#: Is told database, revision, its place, their number, and the seconds that it took.
Progress: TypeAlias = "cabc.Callable[[str, Script, int, int, float], object]"

_logger = logging.getLogger("flask_alembic")

#: Our own keys of ``app.config["ALEMBIC"]``, which Alembic is not given.
_OWN_KEYS: _Options = {
    "migration_lock": True,
    "migration_lock_timeout": 300,
    "lock_timeout": None,
    "exclude_tables": [],
}
_NO_CONNECTION = "Cannot connect to database"
#: A commit that looking at the driver before and after it may not show, as there is a
#: transaction at both looks, or (as after an ``autocommit_block()``) at none.
_COMMIT = r"(?is)(.*;)?\s*COMMIT\b([^;]*\bCHAIN\b|\s*;\s*(BEGIN|START)\b|[\s;]*$)"


class RunOptions(TypedDict, total=False):
    """What methods that talk to databases take beside their target."""

    database: DatabaseNames  #: A name or several; all when left out.
    tag: str | None  #: For ``context.get_tag_argument()`` in revisions.
    x: XArguments  #: For ``context.get_x_argument()``: a dict, or ``KEY=VALUE``.


class DatabaseStatus(NamedTuple):
    """Where one database stands, as :meth:`Alembic.status` reports it."""

    current: Revisions  #: Revisions in the version table.
    heads: Revisions  #: Revisions that an upgrade leads to.
    pending: Revisions  #: What it runs, in order; none if ids are unknown.
    unknown: _Ids  #: Ids in the version table that no revision file has.


def _by_name(given: Any) -> _Options:
    """An argument as a dict: what is no dict belongs to the ``default`` database."""
    by_name = given if isinstance(given, dict) else {"default": given}
    return {name: each for name, each in by_name.items() if each is not None}


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple, set, frozenset)):
        return [*value]

    return [] if value is None else [value]


def _quoted(names: cabc.Iterable[Any]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(map(str, names)))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# -- Errors ----------------------------------------------------------------------------


class FlaskAlembicError(RuntimeError):
    """Set-up or configuration is missing or wrong, or going on would not be safe."""


class MigrationLockTimeout(FlaskAlembicError):
    """Another process, or thread, held the lock of ``database`` for ``seconds``."""

    def __init__(self, database: str, seconds: float) -> None:
        self.database = database
        self.seconds = seconds
        super().__init__(
            f"The migration lock of database '{database}' was not free for"
            f" {seconds:.1f} s ('migration_lock_timeout'): another process migrates it,"
            " or a transaction is open, perhaps of this application itself."
        )


class _OvertakenError(FlaskAlembicError):
    """Another process migrated the database between two transactions of ours."""


def _command_error(message: str) -> Exception:
    """Alembic's error for what the user asked wrongly, imported when it is raised."""
    from alembic.util import CommandError

    return CommandError(message)


# -- Extension -------------------------------------------------------------------------


class Alembic:
    """Alembic's migrations for Flask applications.

    ``database`` is a name or several; all when left out. A wrong request is Alembic's
    ``CommandError``; a wrong set-up or file, a :class:`FlaskAlembicError`.

    :param app: Application to set up; else call :meth:`init_app`.
    :param run_mkdir: Make the migrations folder in :meth:`init_app` when it is missing.
    :param command_name: Name of the command group; empty registers no commands.
    :param metadatas: A MetaData, a list (one database), or a dict of name to either.
    :param engines: An engine, sync or async, or a dict of name to engine.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        run_mkdir: bool = True,
        command_name: str = "db",
        metadatas: MetadataOption | cabc.Mapping[str, MetadataOption] | None = None,
        engines: EngineOption | cabc.Mapping[str, EngineOption] | None = None,
    ) -> None:
        self.run_mkdir = run_mkdir
        self.command_name = command_name
        self.metadatas: dict[str, MetadataOption] = _by_name(metadatas)  #: By database.
        self.engines: dict[str, EngineOption] = _by_name(engines)  #: By database.
        #: Key of our state in an application's extensions, and in ``flask.g``.
        self._key = f"_flask_alembic_{id(self)}"

        if app is not None:
            self.init_app(app)

    def init_app(
        self, app: Flask, run_mkdir: bool | None = None, command_name: str | None = None
    ) -> None:
        """Set up an application: its defaults, commands and (if it can be) folder."""
        name = self.command_name if command_name is None else command_name
        app.extensions["alembic"] = self
        app.extensions[self._key] = _Cache(self, name)
        _fill_in_defaults(app)
        app.teardown_appcontext(self._close_context)

        if name:
            app.cli.add_command(cli, name)

        if run_mkdir is None:
            run_mkdir = self.run_mkdir

        if run_mkdir:
            settings = _read_settings(app)  # not kept: it may still change

            with suppress(FlaskAlembicError):
                _make_folders(settings, self.metadatas)

    @property
    def config(self) -> Config:
        """Alembic's configuration of the current application."""
        from alembic.config import Config

        cache = self._get_cache()

        if cache.config is None:
            config = Config()
            config.file_config.read_dict(cache.settings.sections)
            cache.config = config  # assigned last: other threads may use it at once

        return cache.config

    @property
    def script_directory(self) -> ScriptDirectory:
        """The revision files; read again when one was added, removed or changed."""
        cache = self._get_cache()

        script = cache.script  # which another thread may forget at any time

        if script is None or cache.signature != _signature(script):
            script, cache.signature = _load_history(self.config)
            cache.script = script

        return script

    @property
    def environment_context(self) -> EnvironmentContext:
        """Alembic's environment of the ``default`` or only database, connected."""
        # Ours have one; a context can be made without.
        return self.migration_context.environment_context  # type: ignore[return-value]

    @property
    def migration_contexts(self) -> dict[str, MigrationContext]:
        """A migration context per database, connected until the app context ends.

        Within a revision, or a function of :meth:`run_sync`, until that ends.
        """
        session = self._session()

        for name in session.databases:
            if name not in session.contexts:
                environment = _make_environment(session)
                options = _context_options(session, name)
                environment.configure(session.connect(name), **options)
                session.contexts[name] = environment.get_context()

        return dict(session.contexts)

    @property
    def migration_context(self) -> MigrationContext:
        """The migration context of the ``default`` or only database."""
        return _primary(self.migration_contexts)

    @property
    def ops(self) -> dict[str, Operations]:
        """Alembic's operations per database name, each bound to its database."""
        from alembic.operations import Operations

        return {  # kept with their context, so that they last as long
            name: context.opts.setdefault("operations", Operations(context))
            for name, context in self.migration_contexts.items()
        }

    @property
    def op(self) -> Operations:
        """Alembic's operations on the ``default`` or only database."""
        return _primary(self.ops)

    @property
    def script(self) -> ScriptDirectory:
        """Short for :attr:`script_directory`."""
        return self.script_directory

    @property
    def env(self) -> EnvironmentContext:
        """Short for :attr:`environment_context`."""
        return self.environment_context

    @property
    def context(self) -> MigrationContext:
        """Short for :attr:`migration_context`."""
        return self.migration_context

    @property
    def databases(self) -> tuple[str, ...]:
        """Names of the databases that are migrated."""
        return tuple(_find_databases(self))

    def run_sync(self, fn: cabc.Callable[..., _R], *args: Any) -> _R:
        """Call ``fn(*args)``; in it, low-level objects of async engines may be used."""
        return self._call(lambda session: fn(*args))

    def mkdir(self) -> None:
        """Make the migrations folder, the version locations and ``script.py.mako``."""
        _make_folders(self._get_cache().settings, self.metadatas)

    def rev_id(self) -> str:
        """Make a revision's id: the time in seconds. Can be overridden or assigned."""
        return str(int(time.time()))

    def revision(
        self,
        message: str = "",
        empty: bool = False,
        branch: str = "default",
        parent: RevisionTarget = "head",
        splice: bool = False,
        depend: RevisionTarget | None = None,
        label: str | cabc.Sequence[str] | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        rev_id: str | None = None,
        **options: Unpack[RunOptions],
    ) -> list[Script]:
        """Write a new revision file, filled by autogenerate. Databases are only read.

        :param message: First line of the file and part of its name.
        :param empty: Write an empty revision, without looking at a database.
        :param branch: Branch to continue; a new one is started, labelled and placed.
        :param parent: Revision or revisions to follow; ``head`` is the branch's own.
        :param splice: Allow a parent that is not a head.
        :param depend: Revisions that must run before this one.
        :param label: Further branch labels for it.
        :param path: Version location to write to, in place of the branch's own.
        :param rev_id: Its id, in place of one that :meth:`rev_id` makes.
        :return: The new revisions; none when autogenerate finds nothing.
        """
        request = _Request(
            message, empty, branch, parent, splice, depend, label, path, rev_id
        )
        return self._call(partial(_write_revision, request=request), **options)

    def merge(
        self,
        revisions: RevisionTarget = "heads",
        message: str | None = None,
        label: str | cabc.Sequence[str] | None = None,
        *,
        rev_id: str | None = None,
        splice: bool = False,
    ) -> Script:
        """Write a revision that joins others, in the folder of the first one's branch.

        :param revisions: At least two; ``users@head`` is the head of a branch.
        :param message: First line of the file; ``merge heads`` when left out.
        :param label: Branch labels for it.
        :param rev_id: Its id, in place of one that :meth:`rev_id` makes.
        :param splice: Allow revisions that are not heads.
        """
        parents = _scripts(self.script_directory, revisions)

        if len(parents) < 2:
            raise _command_error(f"{revisions!r}: a merge needs two revisions.")

        branch = min(parents[0].branch_labels, default="default")
        # Not by an override, which may refuse parents that a merge can have.
        return Alembic.revision(
            self,
            message or "merge heads",
            True,
            branch,
            parents,
            splice,
            label=label,
            rev_id=rev_id,
        )[0]

    def upgrade(
        self,
        target: RevisionTarget = "heads",
        *,
        allow_newer: bool = False,
        progress: Progress | None = None,
        **options: Unpack[RunOptions],
    ) -> list[Script]:
        """Run the revisions that lead up to ``target``; those that ran are returned.

        :param target: Revision to reach; an int, of either sign, counts up.
        :param allow_newer: Leave a database alone whose version table has ids that no
            revision file has, as a newer release writes them; else it is an error.
        :param progress: Called as each revision is done.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        job = _Job("upgrade", target, allow_newer=allow_newer, progress=progress)
        return self._call(_migrate, job, **options)

    def downgrade(
        self,
        target: RevisionTarget = -1,
        *,
        progress: Progress | None = None,
        **options: Unpack[RunOptions],
    ) -> list[Script]:
        """Run the downgrades down to ``target``; those that ran are returned.

        :param target: Revision to reach; an int, of either sign, counts down.
        :param progress: Called as each revision is done.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        job = _Job("downgrade", target, progress=progress)
        return self._call(_migrate, job, **options)

    def stamp(
        self,
        target: RevisionTarget = "heads",
        *,
        purge: bool = False,
        **options: Unpack[RunOptions],
    ) -> Revisions:
        """Write ``target`` as if it had run; a branch that is not named keeps its row.

        :param target: One revision or several.
        :param purge: Delete all rows first, also those that no revision file has.
        :return: The revisions that are current now.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        self._call(_migrate, _Job("stamp", target, purge=purge), **options)
        return self._call(_current, **options)

    def run_migrations(self, fn: StepFunction, **kwargs: Any) -> None:
        """Run steps on the databases: the one way of every migration.

        All locks are taken, then all transactions opened, the steps run, all committed.
        On SQLite, MySQL and MariaDB each revision is a transaction of its own; on
        SQLite that is also the lock, which between two revisions is free. What a caller
        has not committed is rolled back first. The error of a run that failed has a
        note that says where each database stands.

        :param fn: ``fn(heads, migration_context)`` returns the steps, perhaps anew.
        :param kwargs: Passed to each ``upgrade`` or ``downgrade`` function.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        session = self._session()

        if session.outer is None:  # no method such as 'upgrade' has opened one
            self._call(lambda inner: _run_online(inner, fn, kwargs))
        else:
            _run_online(session, fn, kwargs)

    def upgrade_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make an upgrade's SQL, by database; connects only if start is ``current``."""
        return self._call(_run_offline, _Job("upgrade", target, start), **options)

    def downgrade_sql(
        self, target: RevisionTarget, start: str, **options: Unpack[RunOptions]
    ) -> dict[str, str]:
        """Make the SQL script of a downgrade, by database name."""
        return self._call(_run_offline, _Job("downgrade", target, start), **options)

    def stamp_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make the SQL script of a stamp, by database name."""
        return self._call(_run_offline, _Job("stamp", target, start), **options)

    def current(self, database: DatabaseNames = None) -> Revisions:
        """Get the revisions in the version tables; an unknown id is an error."""
        return self._call(_current, database=database)

    def heads(self, resolve_dependencies: bool = False) -> Revisions:
        """Get the revisions that no other follows, nor, if so asked, depends on."""
        script = self.script_directory
        names = "heads" if resolve_dependencies else script.get_heads()
        return script.get_revisions(names)

    def branches(self) -> list[Script]:
        """Get the revisions that more than one other follows."""
        return [s for s in self.script_directory.walk_revisions() if s.is_branch_point]

    def log(
        self, start: RevisionTarget = "base", end: RevisionTarget = "heads"
    ) -> list[Script]:
        """Get the revisions from ``end`` to ``start``."""
        script = self.script_directory
        lower = _parse_target(script, start)
        upper = _parse_target(script, end)

        _scripts(script, start)  # refused, if it is no revision

        with _explained(script, upper):
            return list(script.walk_revisions(lower, upper))

    def status(self, database: DatabaseNames = None) -> dict[str, DatabaseStatus]:
        """Tell where each database stands. Nothing is written, no table is made."""
        return self._call(_status, database=database)

    def needs_upgrade(self, database: DatabaseNames = None) -> bool:
        """Tell whether :meth:`upgrade` would run anything; unknown ids are an error."""
        return self._call(_needs_upgrade, _Job("upgrade"), database=database)

    def needs_revision(self, database: DatabaseNames = None) -> bool:
        """Tell whether models and database differ, as :meth:`compare_metadata` does."""
        return bool(self.compare_metadata(database))

    def compare_metadata(self, database: DatabaseNames = None) -> list[Any]:
        """List the differences between models and databases, as Alembic's tuples."""
        script = self.produce_migrations(database)
        return [diff for ops in script.upgrade_ops_list for diff in ops.as_diffs()]

    def produce_migrations(self, database: DatabaseNames = None) -> MigrationScript:
        """Make the operations, for each database, that would bring it to the models."""
        return self._call(_produce_migrations, database=database)

    def _get_cache(self) -> _Cache:
        """What is kept for the application. Subclasses reach it by this name."""
        cache: _Cache = _set_up(self._key)
        return cache

    def _session(self) -> _Session:
        """The innermost session of this extension in this application context."""
        inner = _innermost.get()

        if inner is not None and inner.cache is self._get_cache():
            return inner

        base: _Session = g.setdefault(self._key, _Session(self, None, _Job()))
        return base

    def _close_context(self, error: BaseException | None = None) -> None:
        session = g.pop(self._key, None)

        if session is not None:
            session.close()

    def _call(
        self,
        work: cabc.Callable[[_Session], _R],
        job: _Job | None = None,
        **options: Unpack[RunOptions],
    ) -> _R:
        """Do a method's work in a session, in an event loop where a driver needs it."""
        session = _Session(self, self._session(), job or _Job(), **options)

        def work_inside() -> _R:
            with session.entered():
                return work(session)

        if any(x.engine.dialect.is_async for x in session.databases.values()):
            return _in_event_loop(work_inside)

        return work_inside()


# -- State -----------------------------------------------------------------------------
# A cache lives as long as an application; a session, as its method or context.


def _set_up(key: str) -> Any:
    """What ``init_app`` has left in the current application."""
    if key not in current_app.extensions:
        raise FlaskAlembicError("Not set up: call 'alembic.init_app(app)' first.")

    return current_app.extensions[key]


@dataclass(eq=False)
class _Cache:
    """What is kept for one application: its configuration and its revision files."""

    extension: Alembic
    command_name: str
    config: Config | None = None
    script: ScriptDirectory | None = None
    signature: Any = None  #: Of the files when the script was loaded.

    @cached_property
    def settings(self) -> _Settings:
        return _read_settings(current_app)

    def clear(self) -> None:
        """Forget all, and give back what is open: it is opened and made anew."""
        self.config = None
        self.script = None
        self.__dict__.pop("settings", None)
        self.extension._session().close()


@dataclass(eq=False)
class _Session:
    """What one method, or one application context, works on and has open."""

    extension: Alembic
    outer: _Session | None  #: In which it was opened; None, of a context.
    job: _Job
    database: DatabaseNames = None
    tag: str | None = None
    x: XArguments = None

    def __post_init__(self) -> None:
        self.cache = self.extension._get_cache()
        #: Done so far, by id; a failure may undo them.
        self.ran: dict[str, Script] = {}
        self.contexts: dict[str, MigrationContext] = {}
        #: By engine as well, since that of a database may be replaced by another.
        self.connections: dict[tuple[str, sa.Engine], sa.Connection] = {}
        self._open = ExitStack()

        if self.outer is not None:
            # Only the innermost session opens any, so a copy knows all that are open.
            self.connections.update(self.outer.connections)

    @property
    def settings(self) -> _Settings:
        return self.cache.settings

    @property
    def config(self) -> Config:
        """Alembic's configuration with the arguments that revisions may ask for."""
        from argparse import Namespace

        config = copy.copy(self.extension.config)
        x = self.x

        if isinstance(x, dict):
            x = [f"{key}={value}" for key, value in x.items()]

        config.cmd_opts = Namespace(x=_as_list(x))
        return config

    @cached_property
    def target(self) -> Any:
        """What the job is to reach."""
        sign = {"upgrade": "+", "downgrade": "-"}.get(self.job.kind, "")
        return _parse_target(self.extension.script_directory, self.job.target, sign)

    @cached_property
    def all_databases(self) -> dict[str, _Database]:
        return _find_databases(self.extension)

    @cached_property
    def databases(self) -> dict[str, _Database]:
        """The databases of this session: those that were asked for, or all."""
        found = self.all_databases
        names = list(found) if self.database is None else _as_list(self.database)

        if not names or {*names} - found.keys():
            raise _command_error(f"{_quoted(names)}: databases are {_quoted(found)}.")

        return {name: found[name] for name in names}

    def only(self, name: str) -> str:
        """The option that names a database, where there are several."""
        return f" -n {name}" if len(self.all_databases) > 1 else ""

    def connect(self, name: str, private: bool = False) -> sa.Connection:
        """The connection to a database: that which is open, or a new one.

        A private one is new, and never goes to the application's pool.
        """
        database = self.databases[name]
        is_async = database.engine.dialect.is_async
        key = name, database.engine

        if private or key not in self.connections:
            if is_async and self.outer is None:
                raise FlaskAlembicError(f"'{name}' is async: use it in 'run_sync(fn)'.")

            self.connections[key] = _connect(database, private or is_async, self._open)

        return self.connections[key]

    @contextmanager
    def entered(self) -> _Block:
        """Be the innermost session of this thread, or task, until all is closed."""
        # Not in 'g', which threads and tasks share that have the same context.
        token = _innermost.set(self)

        try:
            yield
        finally:
            _innermost.reset(token)
            self.close()

    def close(self) -> None:
        """Give every connection that was opened here back to its pool."""
        self.contexts.clear()
        self.connections.clear()
        self._open.close()


_innermost: ContextVar[_Session | None] = ContextVar("innermost", default=None)


class _Turn(threading.local):
    """Whether this thread has Alembic's ``op`` and ``context``."""

    is_taken = False


_turn = _Turn()
#: By process, since a child that was forked meanwhile has a turn of its own.
_locks: dict[int, threading.Lock] = {}


@contextmanager
def _taking_turn(session: _Session) -> _Block:
    """Have Alembic's ``op`` and ``context``, which are the process's, for a while."""
    lock = _locks.setdefault(os.getpid(), threading.Lock())

    if _turn.is_taken:
        # To wait here would stop what we wait for, as another task of an event loop.
        raise FlaskAlembicError("This thread runs another migration already.")

    _wait(", ".join(session.databases), session.settings, partial(lock.acquire, False))
    _turn.is_taken = True

    try:
        yield
    finally:
        _turn.is_taken = False
        lock.release()


# -- Configuration ---------------------------------------------------------------------


class _Settings(NamedTuple):
    """``app.config["ALEMBIC"]``, checked and cast."""

    home: str  #: The migrations folder.
    template: str  #: Of revision files.
    locations: list[str]  #: Where revision files are.
    folders: dict[Any, str]  #: Where new ones go, of named branches or others.
    sections: dict[str, _Options]  #: Of ``alembic.ini``, as ConfigParser has it.
    migration_lock: bool
    migration_lock_timeout: float | None
    lock_timeout: float | None
    exclude_tables: list[str]


def _fill_in_defaults(app: Flask) -> None:
    for name in ("ALEMBIC", "ALEMBIC_CONTEXT"):
        if not isinstance(app.config.setdefault(name, {}), dict):
            raise FlaskAlembicError(f"'{name}' must be a dict.")

    options = app.config["ALEMBIC"]
    options.setdefault("script_location", "migrations")
    options.setdefault("version_locations", [])
    options.setdefault("path_separator", "os")
    app.config["ALEMBIC_CONTEXT"].setdefault("compare_server_default", True)


def _read_settings(app: Flask) -> _Settings:
    """Read, check and cast ``app.config["ALEMBIC"]``: the only place that does."""
    root = app.root_path
    options = _OWN_KEYS | app.config["ALEMBIC"]
    own = {key: options.pop(key) for key in _OWN_KEYS}
    _check_own(own)
    home = _find_home(root, options.get("script_location", "migrations"))
    locations = [_versions_folder(home)]
    folders: dict[Any, str] = {None: locations[0]}
    paths = []

    for item in _as_list(options.get("version_locations")):
        branch = None
        path = item

        if isinstance(item, tuple | list) and len(item) == 2:
            branch, path = item

        location = _folder(root, path, "ALEMBIC['version_locations']")
        locations.append(location)
        folders.setdefault(branch, location)

    for path in _as_list(options.get("prepend_sys_path")):
        paths.append(_folder(root, path, "ALEMBIC['prepend_sys_path']"))

    options.update(
        script_location=home,
        version_locations="\n".join(locations),
        prepend_sys_path="\n".join(paths),
        path_separator="newline",  # which no path has in it
    )
    template = f"{home}/script.py.mako"
    return _Settings(home, template, locations, folders, _sections(options), **own)


def _check_own(own: _Options) -> None:
    """Refuse values of ours that cannot be used."""
    for key, value in own.items():
        is_good = isinstance(value, bool)

        if key == "exclude_tables":  # a string would be taken for many
            is_good = isinstance(value, list) and all(isinstance(x, str) for x in value)
        elif key != "migration_lock":
            is_number = type(value) in (int, float)
            is_good = value is None or (is_number and value >= 0)

        if not is_good:
            raise FlaskAlembicError(
                f"ALEMBIC['{key}'] cannot be {value!r}: 'exclude_tables' is a list of"
                " globs, 'migration_lock' True or False, a timeout seconds or None."
            )


def _sections(options: _Options) -> dict[str, _Options]:
    """The sections of ``alembic.ini``: a dict value is one of its own."""
    main: _Options = {}
    sections = {"alembic": main}

    for key, value in options.items():
        if re.search(r"^\w*_lock|^\w*_timeout|^exclude_", key):
            raise FlaskAlembicError(
                f"ALEMBIC has '{key}', but ours are {_quoted(_OWN_KEYS)}."
            )

        if isinstance(value, dict):
            sections[key] = {name: _cast(key, each) for name, each in value.items()}
        else:
            main[key] = _cast(key, value)

    return sections


def _cast(key: str, value: Any) -> str:
    """A value as ConfigParser takes it: a string whose percent signs are doubled."""
    text = str(value)

    if isinstance(value, bool):
        text = text.lower()
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    elif not isinstance(value, (str, int, os.PathLike)):
        raise FlaskAlembicError(f"ALEMBIC['{key}'] cannot be {value!r}.")

    return text.replace("%%", "%").replace("%", "%%")


def _folder(root: str, value: Any, key: str) -> str:
    """The absolute path of a folder, given as a path or as ``package:folder``."""
    path = str(value)

    if not value or not isinstance(value, (str, os.PathLike)):
        raise FlaskAlembicError(f"{key} must be a path, not {value!r}.")

    if ":" in path and not os.path.isabs(path):  # as Alembic has it
        package, _, path = path.partition(":")

        try:
            spec: Any = importlib.util.find_spec(package)
            root = spec.submodule_search_locations[0]
        except Exception as error:  # of any kind, as its parent is imported
            raise FlaskAlembicError(
                f"{key}: there is no package '{package}'."
            ) from error

    return os.path.abspath(os.path.join(root, path))


def _find_home(root: str, location: Any) -> str:
    """The migrations folder, perhaps Flask-Migrate's beside a package."""
    home = _folder(root, location, "ALEMBIC['script_location']")
    beside = f"{os.path.dirname(root)}/migrations"

    # Beside a module, it would be somebody else's history.
    is_package = os.path.isfile(f"{root}/__init__.py")

    if location == "migrations" and is_package and not os.path.isdir(home):
        return beside if _versions_folder(beside) != beside else home

    return home


def _versions_folder(home: str) -> str:
    """The folder of revisions: ``versions``, as in Alembic's layout, or ``home``."""
    versions = f"{home}/versions"

    # One that cannot be read stops no application that never migrates.
    with suppress(OSError):
        if os.path.isfile(f"{home}/env.py") or any(_revision_files([versions])):
            return versions

    return home


# -- Engines and metadata --------------------------------------------------------------


class _Database(NamedTuple):
    """One database: the sync side of its engine, its metadata as given."""

    name: str
    engine: sa.Engine
    metadata: MetadataOption
    options: _Options  #: Of ``EnvironmentContext.configure``, without our hooks.

    @property
    def is_sqlite(self) -> bool:
        return self.engine.name == "sqlite"

    @property
    def place(self) -> Any:
        """Where its version table is, as far as the URL tells."""
        url = self.engine.url
        # In memory, or with a 'creator', the URL tells nothing.
        server = self.engine if url.database in (None, ":memory:") else url
        options = self.options
        return server, options["version_table_schema"], options["version_table"]


def _find_databases(extension: Alembic) -> dict[str, _Database]:
    """The databases to migrate: those that the metadata name. Arguments win."""
    metadatas = _find_metadatas(extension)
    db = current_app.extensions.get("sqlalchemy")
    # A sync engine goes before an async one; Flask-SQLAlchemy calls the default None.
    found = {**getattr(db, "async_engines", {}), **getattr(db, "engines", {})}
    engines = {name or "default": engine for name, engine in found.items()}
    engines |= extension.engines
    missing = metadatas.keys() - engines.keys()
    databases = {}

    if missing:
        raise FlaskAlembicError(
            f"Missing engine config: pass engines configured for {_quoted(missing)}."
        )

    # One file holds the revisions of all.
    batches = any(engines[name].name == "sqlite" for name in metadatas)

    for name, metadata in metadatas.items():
        engine = getattr(engines[name], "sync_engine", engines[name])
        options = _user_options(name, engine, batches)
        databases[name] = _Database(name, engine, metadata, options)

    places = {each.place for each in databases.values()}

    if len(places) < len(databases):
        raise FlaskAlembicError(
            f"Two of {_quoted(databases)} share a 'version_table': rename one."
        )

    return databases


def _find_metadatas(extension: Alembic) -> _Options:
    if extension.metadatas:
        return extension.metadatas

    db: Any = current_app.extensions.get("sqlalchemy")

    if not hasattr(db, "metadata"):
        raise FlaskAlembicError(
            "No metadata found: pass 'metadatas' when setting up Alembic or, with"
            " Flask-SQLAlchemy, call 'db.init_app(app)'."
        )

    if any(db.metadatas):  # a named bind: the default's key is None
        _check_template(extension)

    return {"default": db.metadata}


def _user_options(name: str, engine: sa.Engine, batches: bool) -> _Options:
    """The ``configure`` options of a database: ours, the common ones, its own."""
    common = current_app.config["ALEMBIC_CONTEXT"]
    options: _Options = {
        "version_table": "alembic_version",
        "version_table_schema": None,
        "render_as_batch": batches,
    }

    if engine.name == "sqlite":
        # It rolls DDL back when asked to. A second connection sees only commits.
        options.update(transactional_ddl=True, transaction_per_migration=True)

    options.update(common)

    if engine.name in ("mysql", "mariadb"):
        # Alembic's comparison sees changes in most of their columns.
        options["compare_server_default"] = False

    options.update(common.get(name) or {})
    return options


def _primary(by_name: dict[str, _R]) -> _R:
    """That of the database which is meant where one answer is asked for."""
    if "default" in by_name:
        return by_name["default"]

    if len(by_name) > 1:
        raise FlaskAlembicError(f"No 'default': name one of {_quoted(by_name)}.")

    [only] = by_name.values()
    return only


# -- Revisions -------------------------------------------------------------------------
# What is asked of the history without a database.


def _parse_target(script: ScriptDirectory, target: Any, sign: str = "") -> Any:
    """A target as Alembic takes it: a name, or a tuple of several.

    With a sign, an int and a text of digits are counts in that direction.
    """
    names = []

    for each in _as_list(target) or [None]:  # an empty list means nothing, as None does
        name = getattr(each, "revision", each)

        if sign and type(name) is int:
            name = f"{sign}{abs(name)}"

        if not name or not isinstance(name, str):
            raise _command_error(f"{target!r} is no revision.")

        if sign and name.isdecimal():
            name = _count_or_id(script, name, sign)

        names.append(name)

    return names[0] if len(names) == 1 else tuple(names)


def _count_or_id(script: ScriptDirectory, digits: str, sign: str) -> str:
    """Digits are the id that they spell, else a count, if that can be told."""
    longer = [id_ for id_ in _revisions_by_id(script) if id_.startswith(digits)]

    if not longer:
        return f"{sign}{digits}"

    # Nobody counts to a thousand.
    if digits in longer or len(digits) > 3:
        return digits

    raise _command_error(
        f"'{digits}' may be a count or the beginning of an id: write '{sign}{digits}',"
        f" or one of {_quoted(longer)}."
    )


def _is_relative(target: Any) -> bool:
    """Whether a target is so many revisions from another, or from the database."""
    return re.search(r"[+-]\d+$", str(target)) is not None


def _load_history(config: Config) -> tuple[ScriptDirectory, Any]:
    """Load the revision files, and refuse those that form no history."""
    from alembic.script import ScriptDirectory
    from alembic.script.revision import RevisionMap

    try:
        script: Any = ScriptDirectory.from_config(config)
    except Exception as error:
        raise FlaskAlembicError(
            f"{error} Here, 'init' is {_typed('mkdir')}."
        ) from error

    # Alembic puts 'prepend_sys_path' there each time.
    sys.path[:] = dict.fromkeys(sys.path)
    signature = _signature(script)
    scripts = _load_files(script)
    _check_history(scripts)
    script.revision_map = RevisionMap(lambda: scripts)
    script.get_revisions("heads")  # fails if there is a loop
    return script, signature


def _check_history(scripts: list[Script]) -> None:
    """Name the files where two have one id, or what one follows is in none."""
    paths: _Options = {}

    for script in scripts:
        for name in (script.revision, *script.branch_labels):
            path = paths.setdefault(name, script.path)

            if path != script.path:
                raise FlaskAlembicError(
                    f"'{path}' and '{script.path}' are both '{name}'."
                )

    for script in scripts:
        needs = script.dependencies or None  # "" is none, to Alembic
        needed = {*_as_list(script.down_revision), *_as_list(needs)}
        missing = _quoted(needed - paths.keys())

        if missing:
            raise FlaskAlembicError(f"'{script.path}' needs {missing}: no file has it.")


def _revisions_by_id(script: ScriptDirectory) -> dict[str, Script]:
    """All revisions by id, parents first."""
    return {each.revision: each for each in reversed([*script.walk_revisions()])}


def _labels(script: ScriptDirectory) -> set[str]:
    return {label for each in script.walk_revisions() for label in each.branch_labels}


def _scripts(script: ScriptDirectory, target: Any) -> list[Script]:
    """The revisions that a target stands for; ``base`` is none."""
    parsed = _parse_target(script, target)

    with _explained(script, parsed):
        # Below base, Alembic answers with something that is no revision.
        found = {each.revision: each for each in script.get_revisions(parsed)}

    return list(found.values())


def _below(script: ScriptDirectory, ids: _Names) -> set[str]:
    """Revisions and all that they follow or depend on."""
    return {x.revision for id_ in ids for x in script.walk_revisions("base", id_)}


@contextmanager
def _explained(script: ScriptDirectory, target: Any, rows: _Ids = ()) -> _Block:
    """Repeat the target in what Alembic says of it, or stumbles over."""
    from alembic.util import CommandError

    try:
        for name in _as_list(target):
            if "@" in name:  # Alembic takes 'nope@base' and 'nope@-1' for 'base'
                script.get_revision(name.split("@")[0])

        yield
    except Exception as error:
        reason = "it is no revision"
        heads = getattr(error.__cause__, "heads", ())

        if heads:
            raise _several_heads(heads) from error

        if isinstance(error, AttributeError) and inspect.ismodule(error.obj):
            reason = f"'{error.obj.__file__}' has no function '{error.name}'"
        elif _is_relative(target):
            near = _quoted(script.get_revisions(rows))  # with what they follow
            reason = f"not that many revisions, or several ways, from {near or 'there'}"
        elif isinstance(error, CommandError):
            reason = str(error).rstrip(".")

        raise _command_error(
            f"'{target}' cannot be used: {reason}. See {_typed('log')}."
        ) from error


def _several_heads(heads: _Names) -> Exception:
    merge = _typed(f'merge -m "merge heads" {" ".join(sorted(heads))}')
    return _command_error(
        "There are several heads. Name one, take 'heads' for all, or merge them:"
        f" {merge}"
    )


def _unknown_ids(script: ScriptDirectory, rows: Any) -> _Ids:
    """Ids in a version table that no revision file has; NULL is such a one."""
    known = _revisions_by_id(script) if rows else ()
    return tuple(str(row) for row in rows if row not in known)


def _unknown_error(session: _Session, name: str, unknown: _Names) -> Exception:
    only = session.only(name)
    return _command_error(
        f"Database '{name}' is at {_quoted(unknown)}, which no revision file has."
        " Probably a newer release has migrated it: deploy that release again, or let"
        f" this one start beside it with {_typed(f'upgrade --allow-newer{only}')}. If"
        " the file is lost, get it back, or run"
        f" {_typed(f'stamp --purge{only} REVISION')}."
    )


def _typed(words: str) -> str:
    """One of our commands as it is typed in this application."""
    name = _extension()._get_cache().command_name or "db"
    return f"'flask {name} {words}'"


# -- Environment -----------------------------------------------------------------------
# The job and its steps, the files, the connections, and the run: one attempt on one
# database. A driver that tells in its own way whether a transaction is open is added in
# '_is_in_transaction'; a server's lock under 'Guards'.
# Only here are Alembic's private names touched.


class _Job(NamedTuple):
    """What a method asks for: an upgrade, a downgrade, a stamp, or a caller's own."""

    kind: str = "own"
    target: RevisionTarget = "heads"
    start: str = "base"
    purge: bool = False
    allow_newer: bool = False
    progress: Progress | None = None


def _job_steps(session: _Session, rows: Any, context: Any) -> list[Any]:
    """The steps of a session's job from the ids in a version table."""
    # Read when the lock is held: the files may have changed while we waited.
    script: Any = session.extension.script_directory
    job = session.job
    target = session.target
    unknown = _unknown_ids(script, rows)

    if unknown:
        name = context.opts["database"]

        if not job.allow_newer:
            raise _unknown_error(session, name, unknown)

        _logger.info(
            f"Database '{name}' is left alone: it is at {_quoted(unknown)}, which no"
            " revision file has."
        )
        return []

    if job.kind == "stamp":
        return _stamp_steps(script, {*rows}, target)

    if str(target)[0] in "+-" and len(rows) > 1:
        raise _ambiguous(script, rows, target)

    with _explained(script, target, rows):
        # Alembic's commands make theirs so; no public function does.
        make = getattr(script, f"_{job.kind}_revs")
        return list(make(target, rows))


def _ambiguous(script: ScriptDirectory, rows: _Ids, target: Any) -> Exception:
    """Refuse to count from several branches: which one is not said."""
    names = {min(x.branch_labels, default=x.revision) for x in _scripts(script, rows)}

    if len(names) < len(rows):  # two of them have one label
        names = {*rows}

    choice = _quoted(f"{name}@{target}" for name in names)
    return _command_error(f"'{target}' is ambiguous: name one of {choice}.")


def _stamp_steps(script: Any, rows: set[str], target: Any) -> list[Any]:
    """Steps to exactly the rows that are asked for; Alembic's own lose a branch."""
    from alembic.runtime.migration import StampStep

    if _is_relative(target):
        raise _command_error(f"'{target}' is relative: name a revision.")

    history = script.revision_map
    applied = _below(script, rows)
    named = _scripts(script, target)
    above = history._get_descendant_nodes(  # noqa: SLF001
        named, include_dependencies=False
    )
    undone = {*above} - {*named}

    for name in _as_list(target):
        if not _scripts(script, name):  # 'base' or 'branch@base'
            lineage = history.filter_for_lineage(applied, name)
            undone.update(script.get_revisions(lineage))

    # And all that follows or depends on something that is undone.
    and_above = history._get_descendant_nodes(undone)  # noqa: SLF001
    applied.difference_update(each.revision for each in and_above)
    applied.update(_below(script, (each.revision for each in named)))
    wanted = applied.copy()

    for id_ in applied:
        wanted.difference_update(script.get_revision(id_)._all_down_revisions)  # noqa: SLF001

    # A script that removes the last row first would make the table again.
    new = [StampStep(None, id_, True, True, history) for id_ in sorted(wanted - rows)]
    old = [StampStep(id_, None, False, True, history) for id_ in sorted(rows - wanted)]
    return new + old


def _signature(script: Any) -> _Options:
    """What changes when a revision file is added, removed or changed."""
    found: _Options = {}
    pattern = "**/*.py" if script.recursive_version_locations else "*.py*"

    for location in script._version_locations:  # noqa: SLF001
        for path in location.glob(pattern):
            # Of a link itself, as an editor's lock is one to nowhere.
            found[str(path)] = os.lstat(path).st_mtime_ns

    return found


def _load_files(script: Any) -> list[Script]:
    """Load the files one by one: Alembic, which loads all, names none that fails."""
    from alembic.script import Script

    files: Any = []
    found = []

    # Its public attribute has no paths.
    for location in script._version_locations:  # noqa: SLF001
        files += Script._list_py_dir(script, location)  # noqa: SLF001

    for path in dict.fromkeys(each.resolve() for each in files):
        try:
            found.append(Script._from_path(script, path))  # noqa: SLF001
        except (Exception, SystemExit) as error:
            raise FlaskAlembicError(
                f"'{path}' cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    return [each for each in found if each]  # Alembic skips what has no revision's name


def _connect(database: _Database, has_own_pool: bool, stack: ExitStack) -> Any:
    """A connection, which the stack gives back to its pool.

    One that migrates a server, or that is bound to an event loop, must never reach the
    application's pool: it has a pool of its own.
    """
    engine: Any = database.engine

    # SQLAlchemy 2.0 listens to no connection of an engine with options.
    while hasattr(engine, "_proxied"):
        engine = engine._proxied  # noqa: SLF001

    # An in-memory database lives in the one connection of its pool.
    if has_own_pool and not isinstance(engine.pool, sa.StaticPool):
        engine = copy.copy(engine)  # which has the listeners
        engine.pool = engine.pool.recreate()
        stack.callback(engine.pool.dispose)

    try:
        connection = engine.connect()
    except Exception as error:
        # Without user and password, and the query, which may hold one too.
        place = engine.url._replace(username=None, password=None, query={})
        cause = _one_line(getattr(error, "orig", error))
        error.add_note(f"{_NO_CONNECTION} '{database.name}' ({place}): {cause}")
        raise

    stack.callback(connection.close)

    return connection.execution_options(**database.engine.get_execution_options())


def _is_in_transaction(driver: Any) -> bool:
    """Whether a driver's connection has a transaction; true where it does not tell."""
    if hasattr(driver, "in_transaction"):  # sqlite3, aiosqlite
        return bool(driver.in_transaction)

    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return bool(driver.is_in_transaction())

    info = getattr(driver, "info", None)  # psycopg, psycopg2
    return bool(getattr(info, "transaction_status", True))


@contextmanager
def _reading(connection: Any) -> _Block:
    """End the transaction that reading begins, but not one that was open before."""
    began = not connection.in_transaction()

    try:
        yield
    finally:
        if began:
            connection.rollback()


def _in_event_loop(fn: cabc.Callable[[], _R]) -> _R:
    """Call a function where an async driver can be awaited."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    if concurrency.in_greenlet():
        return fn()

    def run() -> _R:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(concurrency.greenlet_spawn(fn))

    loop = None

    with suppress(RuntimeError):
        loop = asyncio.get_running_loop()

    if loop is None:
        return run()  # here: not all that a revision imports tolerates a thread

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_context().run, run).result()


def _rows_of(database: _Database, connection: sa.Connection) -> set[Any]:
    """The ids in a version table, by one query that needs no Alembic."""
    _, schema, name = database.place
    table = sa.table(name, sa.column("version_num"), schema=schema)
    return {*connection.scalars(sa.select(table))}


def _heads_of(context: MigrationContext) -> _Ids:
    with _reading(context.connection):
        return context.get_current_heads()


def _known_status(session: _Session) -> dict[str, DatabaseStatus]:
    """The status of databases that all are at ids which files have."""
    states = _status(session)

    for name, state in states.items():
        if state.unknown:
            raise _unknown_error(session, name, state.unknown)

    return states


def _current(session: _Session) -> Revisions:
    states = _known_status(session).values()
    return tuple(dict.fromkeys(each for state in states for each in state.current))


def _status(session: _Session) -> dict[str, DatabaseStatus]:
    script: Any = session.extension.script_directory
    heads = script.get_revisions("heads")
    known = _revisions_by_id(script).values()
    result = {}

    for name, context in session.extension.migration_contexts.items():
        rows = _heads_of(context)
        current = tuple(each for each in known if each.revision in rows)
        unknown = _unknown_ids(script, rows)
        steps = [] if unknown else script._upgrade_revs("heads", rows)  # noqa: SLF001
        pending = tuple(step.revision for step in steps)
        result[name] = DatabaseStatus(current, heads, pending, unknown)

    return result


def _needs_upgrade(session: _Session) -> bool:
    steps = partial(_job_steps, session)
    return not _is_current(session) and bool(_databases_to_run(session, steps))


def _migrate(session: _Session) -> list[Script]:
    if not _is_current(session):
        session.extension.run_migrations(partial(_job_steps, session))

    return list(session.ran.values())


def _databases_to_run(session: _Session, fn: StepFunction) -> list[str]:
    """The databases that have something to do; all are asked, nothing is written."""
    names = []

    for name, context in session.extension.migration_contexts.items():
        # A subclass may read more; what stays open would be taken for a caller's.
        with _reading(context.connection):
            # A purge deletes what the steps would be made from.
            if session.job.purge or list(fn(_heads_of(context), context)):
                names.append(name)

    return names


def _make_environment(session: _Session, **given: Any) -> EnvironmentContext:
    from alembic.environment import EnvironmentContext

    script = session.extension.script_directory
    return EnvironmentContext(session.config, script, tag=session.tag, **given)


@dataclass(eq=False)
class _Run:
    """One attempt on one database: its environment, its guard, its steps.

    Without a connection, it writes SQL from the given heads on.
    """

    session: _Session
    name: str
    fn: StepFunction
    connection: Any = None
    heads: Any = ()  #: The version table, as far as the run has come.
    step: Any = None  #: That is being run, or has failed.
    is_working = False  #: Whether the step's own code is running.
    committed = False  #: Whether it has committed something by itself.
    was_open = False  #: Whether the driver had a transaction at the last look.

    def __post_init__(self) -> None:
        session = self.session
        self.database = session.databases[self.name]
        self.guard = _make_guard(self.database, self.connection, session.settings)
        self.output = io.StringIO()
        options = _context_options(session, self.name)
        is_offline = self.connection is None

        if session.job.kind == "stamp":
            # All rows at once, which MariaDB and MySQL can do as well.
            options.update(transaction_per_migration=False, transactional_ddl=True)

        if is_offline:
            # Other parameter styles would double the percent signs in the script.
            style = {"paramstyle": "named", **options.get("dialect_opts", {})}
            url = self.database.engine.url
            options.update(url=url, dialect_opts=style, literal_binds=True)
        else:
            self.driver = self.connection.connection.driver_connection

        self.environment = _make_environment(
            session,
            fn=self.steps,
            purge=session.job.purge,
            as_sql=is_offline,
            starting_rev=self.heads,
            output_buffer=self.output,
        )
        self.environment.configure(self.connection, **options)
        self.context: Any = self.environment.get_context()
        self.context.on_version_apply_callbacks += (self.on_applied,)

    @contextmanager
    def held(self) -> _Block:
        """Hold the lock, and see what becomes of transactions."""
        # Once a run, as it takes SQLAlchemy long to add a listener; and after those of
        # the guard, which may refuse a commit.
        with (
            self.guard.held(),
            _listening(
                self.connection,
                commit=self.on_commit,
                rollback=self.on_rollback,
                before_cursor_execute=self.on_statement,
            ),
        ):
            yield

    def steps(self, heads: Any, context: Any) -> cabc.Iterator[Any]:
        """The steps; Alembic takes each when the one before is in the version table."""
        self.heads = {*heads}
        steps = [*self.fn(heads, context)]
        progress = self.session.job.progress

        for place, step in enumerate(steps, 1):
            script = getattr(step, "revision", None)  # a stamp has none

            if script is None:
                yield step
                continue

            began = time.monotonic()
            call = partial(self.call, step, step.migration_fn)
            # Alembic reads its name.
            step.migration_fn = update_wrapper(call, step.migration_fn)
            self.committed = False
            yield step

            # Its row is committed too, before the next revision: an empty block commits
            # and begins. Where each revision is a transaction, Alembic has done so.
            if self.committed and self.connection.in_transaction():
                with self.context.autocommit_block():
                    pass

            self.step = None
            self.session.ran[script.revision] = script

            if progress is not None:
                progress(self.name, script, place, len(steps), time.monotonic() - began)

    def call(self, step: Any, function: Any, /, **kwargs: Any) -> None:
        """Call the function of a revision, unless it is not for this database."""
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{_title(step)} has an async function, which cannot run.")

        databases = self.session.all_databases
        name = self.name
        made_for = {name}

        if "engine_name" in inspect.signature(function).parameters:
            prefix = "upgrade_" if step.is_upgrade else "downgrade_"
            suffixes = {
                each.removeprefix(prefix)
                for each in vars(step.revision.module)
                if each.startswith(prefix)
            }
            made_for = suffixes or made_for

            if name == "default" and "" in made_for:  # as Flask-Migrate names it
                name = ""

            kwargs["engine_name"] = name
        elif len(databases) > 1:
            made_for = {"default"}  # it is from before there was a second database

        # A database that came later is left out; but if one that the file names is
        # gone, it was renamed, perhaps to this one.
        if name in made_for:
            self.execute(step, partial(function, **kwargs))
        elif made_for - {"", *databases}:
            raise _command_error(
                f"{_title(step)} has no function for database '{name}': was it renamed?"
            )

    def execute(self, step: Any, work: Any) -> None:
        """Do what a revision does, and see what becomes of the transaction."""
        if self.connection is None:
            try:
                work()
            except Exception as error:
                raise _command_error(
                    f"{_title(step)} cannot be written as SQL, without a connection:"
                    f" {error}"
                ) from error

            return

        self.guard.check(self.heads)
        self.step = step
        self.was_open = False
        self.look()
        self.is_working = True

        try:
            work()
        except BaseException as error:
            error.add_note(f"{_title(step)} failed.")

            # A statement that fails, as on a full disk, may roll back by itself.
            if isinstance(error, exc.DBAPIError) and self.database.is_sqlite:
                self.was_open = False

            raise
        finally:
            self.look()
            self.is_working = False

        # What Alembic opened: for the run, for the step, after an autocommit_block().
        transaction = self.context._transaction  # noqa: SLF001

        if transaction is not None and not transaction.is_active:
            raise FlaskAlembicError(
                f"{_title(step)} ended the migration's own transaction, by a 'commit()'"
                " or 'rollback()': use 'op.get_context().autocommit_block()' instead."
            )

        self.guard.check(self.heads)

    def look(self) -> None:
        """See what only the driver knows, as after ``op.execute("COMMIT")``."""
        is_lost = self.connection.closed or self.connection.invalidated
        # What is lost with its connection was not committed.
        is_open = is_lost or _is_in_transaction(self.driver)

        # Between two revisions, Alembic commits.
        if self.is_working and self.was_open and not is_open:
            self.committed = True

        self.was_open = is_open

    def on_commit(self, connection: Any) -> None:
        """An ``autocommit_block()`` begins, or the revision calls ``commit()``."""
        if self.is_working:
            self.committed = True

    def on_rollback(self, connection: Any) -> None:
        """The revision calls ``rollback()``, also by what it calls."""
        self.was_open = False

    def on_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> Any:
        self.look()

        if re.match(r"(?i)\s*(ROLLBACK|ABORT)\b(?!.*\bTO\b)", statement):
            raise FlaskAlembicError("A 'ROLLBACK' would undo the revisions before it.")

        # On SQLite, without a transaction each statement commits what it does.
        commits = self.database.is_sqlite and not self.was_open

        if commits or re.match(_COMMIT, statement):
            self.committed = True

        return statement, parameters

    def on_applied(self, heads: _Names, **_: Any) -> None:
        self.heads = {*heads}

    def outcome(self) -> str:
        """Where the database stands after a failure, and what to do about it."""
        where = "stands where it cannot be read now"
        rows = self.heads

        with suppress(Exception):
            contexts = self.session.extension.migration_contexts
            rows = {*_heads_of(contexts[self.name])}
            where = f"is at {_quoted(rows) or 'base'}"

        line = f"Database '{self.name}' {where}: what was not committed is rolled back."

        is_undone = self.guard.rolls_back or self.context.impl.transactional_ddl

        if self.step is None or (is_undone and not self.committed):
            return line

        script = self.step.revision
        id_ = script.revision
        names = [id_]

        # It is done and recorded: that of an upgrade is there, of a downgrade is gone.
        if (id_ in rows) == self.step.is_upgrade:
            return line

        if not self.step.is_upgrade:
            names = _as_list(script.down_revision) or [f"{id_}@base"]
            names.extend(rows - {id_})

        stamp = f"stamp{self.session.only(self.name)} {' '.join(names)}"
        return (
            f"{line} What '{id_}' has committed stays (on MariaDB and MySQL, each DDL"
            " statement commits): undo it by hand and run the command again, or finish"
            f" it and run {_typed(stamp)}."
        )


def _title(step: Any) -> str:
    return f"Revision '{step.revision.revision}' ('{step.revision.path}')"


def _run_online(session: _Session, fn: StepFunction, kwargs: _Options) -> None:
    """Run steps on a session's databases, anew where another process was faster."""
    session.ran.clear()

    with _taking_turn(session):
        while True:
            try:
                return _attempt(session, fn, kwargs)
            except _OvertakenError:
                if session.job.kind == "own" or _is_relative(session.target):
                    raise


def _attempt(session: _Session, fn: StepFunction, kwargs: _Options) -> None:
    """Run steps once: on all databases or none, as far as they allow."""
    names = list(session.databases)

    # What a caller has open is not ours to commit; and Alembic would not commit what
    # it runs within a transaction of another.
    for connection in session.connections.values():
        connection.rollback()

    if session.job.kind != "own":
        # A SQLite file may be locked: then all stay, and the guard waits for it.
        with suppress(exc.OperationalError):
            names = _databases_to_run(session, fn)

    if not names:
        return

    # What the extension works on when a revision calls it.
    inner = _Session(session.extension, session, session.job, names)
    runs: dict[str, _Run] = {}

    try:
        with inner.entered(), ExitStack() as stack:
            # All locks first, in the same order in every process. SQLite's is taken as
            # each transaction begins.
            for name in sorted(names):
                private = not session.databases[name].is_sqlite
                run = runs[name] = _Run(session, name, fn, inner.connect(name, private))
                inner.contexts[name] = run.context
                stack.enter_context(run.held())

            for run in runs.values():
                stack.enter_context(run.context.begin_transaction())

            for name in names:
                with runs[name].environment:
                    runs[name].environment.run_migrations(**kwargs)
    except BaseException as error:
        # Before a revision has begun, there is nothing to tell.
        if session.ran or any(run.step for run in runs.values()):
            for run in runs.values():
                error.add_note(run.outcome())

        raise


def _run_offline(session: _Session) -> dict[str, str]:
    """Write the steps as SQL, from where the databases stand or from a given start."""
    start = session.job.start
    result = {}

    for name in session.databases:
        has_table = False

        if start == "current":
            live: Any = session.extension.migration_contexts[name]

            with _reading(live.connection):
                rows = live.get_current_heads()
                has_table = live._has_version_table()  # noqa: SLF001
        else:
            scripts = _scripts(session.extension.script_directory, start)
            rows = [each.revision for each in scripts]

        run = _Run(session, name, partial(_job_steps, session), heads=rows)
        dialect = run.context.dialect
        # SQLAlchemy 2.0 doubles backslashes until it has seen PostgreSQL's setting.
        dialect._backslash_escapes = dialect.name != "postgresql"  # noqa: SLF001

        if has_table:
            # Alembic takes an empty version table for none, and would make it.
            run.context._version.create = lambda connection: None  # noqa: SLF001

        with _taking_turn(session), run.environment, run.context.begin_transaction():
            run.environment.run_migrations()

        result[name] = run.output.getvalue()

    return result


# -- Guards ----------------------------------------------------------------------------
# Around a run on a database: its lock, its limits, SQLite's transaction. For a fourth
# server, add a class and a line in '_GUARDS'; then look at '_is_in_transaction' for its
# drivers and at '_user_options' for what else it needs.


@dataclass(eq=False)
class _Guard:
    """Does nothing: for offline runs, servers that have no lock of ours, and SQLite
    with 'transactional_ddl' off.
    """

    database: _Database
    connection: Any
    settings: _Settings
    rolls_back = False  #: Whether DDL is rolled back, whatever Alembic knows.

    @contextmanager
    def held(self) -> _Block:
        """Be there for a run: hold a server's lock, keep the limits."""
        yield

    def check(self, heads: set[str]) -> None:
        """SQLite's only: see, before and after a revision, that the lock is ours."""


class _ServerGuard(_Guard):
    """Takes a lock of the server's session, which no commit in between gives up."""

    take: str  #: In SQL, true when the lock of ``:key`` was free, and is ours.
    release: str  #: In SQL, true when it was ours.
    limit: str  #: A statement that begins each transaction; '%s' are the seconds.

    @contextmanager
    def held(self) -> _Block:
        connection = self.connection
        # The engine's own may be AUTOCOMMIT, where nothing can be rolled back.
        connection.execution_options(isolation_level=connection.default_isolation_level)

        with _listening(connection, begin=self.on_begin):
            _wait(self.database.name, self.settings, partial(self.ask, self.take))

            try:
                yield
            finally:
                with suppress(exc.SQLAlchemyError):
                    connection.rollback()

                    # With a lost connection, the server has released the lock.
                    if not (connection.invalidated or self.ask(self.release)):
                        _logger.warning(
                            f"Lost the lock of '{self.database.name}', as by a pooler:"
                            " turn 'migration_lock' off."
                        )

    def ask(self, function: str) -> bool:
        """Call a function of the lock; without one, all goes well."""
        if not self.settings.migration_lock:
            return True

        _, schema, table = self.database.place
        default = self.connection.dialect.default_schema_name
        key = {"key": f"flask_alembic:{schema or default}.{table}"}

        # Ended at once: a concurrent index build waits for all that are open.
        with _reading(self.connection):
            return bool(self.connection.scalar(sa.text(f"SELECT {function}"), key))

    def on_begin(self, connection: sa.Connection) -> None:
        seconds = self.settings.lock_timeout

        if seconds is not None:
            connection.exec_driver_sql(self.limit % seconds)


class _PostgresqlGuard(_ServerGuard):
    rolls_back = True
    take = "pg_try_advisory_lock(hashtextextended(:key, 0))"
    release = "pg_advisory_unlock(hashtextextended(:key, 0))"
    # For the transaction only: a pooler would pass a session's on. And 0 is no limit.
    limit = "SELECT set_config('lock_timeout', greatest(%s * 1000, 1) || 'ms', true)"


class _MysqlGuard(_ServerGuard):
    # The name is the server's, so it has the database in it, as the schema.
    take = "GET_LOCK(SHA1(:key), 0)"
    release = "RELEASE_LOCK(SHA1(:key))"
    limit = "SET lock_wait_timeout = GREATEST(CEILING(%s), 1)"


@dataclass(eq=False)
class _SqliteGuard(_Guard):
    """Makes SQLite's transaction cover DDL; its ``BEGIN IMMEDIATE`` is the lock."""

    _is_retaken = False  #: Whether the lock was taken anew since the last check.

    def __post_init__(self) -> None:
        self._driver = self.connection.connection.dbapi_connection
        self._cursor = self._driver.cursor()
        [self._enforced] = self.pragma("foreign_keys")
        self._orphans: _Options = {}  # when the transaction began

    @contextmanager
    def held(self) -> _Block:
        connection = self.connection
        driver = self._driver
        level = driver.isolation_level
        mode = getattr(driver, "autocommit", -1)

        if mode != -1:  # Python 3.12's own control: it knows no BEGIN IMMEDIATE
            driver.autocommit = -1
            driver.rollback()

        if "AUTOCOMMIT" in connection.get_execution_options().values():
            connection.execution_options(isolation_level="SERIALIZABLE")

        try:
            with _listening(
                connection,
                begin=self.on_begin,
                commit=self.on_commit,
                before_cursor_execute=self.before_statement,
            ):
                yield
        finally:
            with suppress(Exception):  # as of a connection that Ctrl-C has closed
                connection.rollback()
                driver.rollback()
                self.pragma(f"foreign_keys = {self._enforced}")
                driver.isolation_level = level

                if mode != -1:
                    driver.autocommit = mode

    def check(self, heads: set[str]) -> None:
        """Take the lock again where a revision gave it up; see who had it since."""
        if not _is_in_transaction(self.connection.connection.driver_connection):
            _wait(self.database.name, self.settings, self.take)

        if self._is_retaken and heads != _rows_of(self.database, self.connection):
            raise _OvertakenError(
                f"Another process migrated '{self.database.name}': run again."
            )

        self._is_retaken = False

    def on_begin(self, connection: Any) -> None:
        """Take the lock; in an ``autocommit_block()``, work as the application does."""
        if "AUTOCOMMIT" in connection.get_execution_options().values():
            self.pragma(f"foreign_keys = {self._enforced}")
            return

        _wait(self.database.name, self.settings, self.take)
        self._orphans = self.count_orphans()

    def take(self) -> bool:
        """Try to begin a transaction, which has the lock."""
        self._driver.isolation_level = None  # an autocommit_block() gave it back
        # A batch operation drops the original table, which would delete its children.
        self.pragma("foreign_keys = 0")
        patience = self.pragma("busy_timeout")
        self.pragma("busy_timeout = 0")

        try:
            self._cursor.execute("BEGIN IMMEDIATE")
            # Only a write finds a file that is read-only.
            self.pragma(f"user_version = {self.pragma('user_version')[0]}")
        except Exception as error:
            if "locked" not in str(error):
                raise exc.OperationalError("BEGIN IMMEDIATE", None, error) from error

            return False
        finally:
            self.pragma(f"busy_timeout = {patience[0]}")

        self._is_retaken = True
        return True

    def on_commit(self, connection: Any) -> None:
        """Refuse a transaction that adds rows which refer to nothing."""
        for name, count in self.count_orphans().items():
            if count > self._orphans.get(name, 0):
                raise FlaskAlembicError(
                    f"Refused to orphan rows of '{name}' in '{self.database.name}'."
                )

    def before_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> Any:
        # SQLAlchemy's recipe for SQLite has a listener of the engine emit BEGIN.
        if re.match(r"(?i)\s*BEGIN", statement):
            statement = "SELECT 1"

        return statement, parameters

    def pragma(self, text: str) -> Any:
        self._cursor.execute(f"PRAGMA {text}")
        return self._cursor.fetchone()

    def count_orphans(self) -> _Options:
        """How many rows of each table refer to nothing."""
        cursor = self._cursor
        found: _Options = {}

        if not self._enforced:
            return found

        cursor.execute("SELECT name FROM sqlite_master WHERE type = 'table'")

        for [name] in cursor.fetchall():
            # It fails where a key of the table refers to columns that are not unique.
            with suppress(Exception):
                cursor.execute(
                    "SELECT count(*) FROM pragma_foreign_key_check(?)", [name]
                )
                found[name] = cursor.fetchone()[0]

        return found


_GUARDS = {
    "postgresql": _PostgresqlGuard,
    "mysql": _MysqlGuard,
    "mariadb": _MysqlGuard,
    "sqlite": _SqliteGuard,
}


def _make_guard(database: _Database, connection: Any, settings: _Settings) -> _Guard:
    guard = _GUARDS.get(database.engine.name, _Guard)

    by_alembic = database.is_sqlite and not database.options["transactional_ddl"]

    if connection is None or by_alembic:
        guard = _Guard

    return guard(database, connection, settings)


def _listening(connection: Any, **listeners: Any) -> ExitStack:
    """Listen to a connection's events; one of them returns what is to be executed."""
    stack = ExitStack()

    for name, listener in listeners.items():
        event.listen(connection, name, listener, retval=name == "before_cursor_execute")
        stack.callback(event.remove, connection, name, listener)

    return stack


def _wait(name: str, settings: _Settings, attempt: cabc.Callable[[], bool]) -> None:
    """Try for a lock until it is ours, with a pause that grows."""
    timeout = settings.migration_lock_timeout
    began = time.monotonic()
    patience = 1

    while not attempt():
        waited = time.monotonic() - began

        if timeout is not None and waited >= timeout:
            raise MigrationLockTimeout(name, waited)

        if waited > patience:
            patience *= 4
            _logger.info(f"Waiting for the lock to migrate '{name}' ({waited:.0f} s).")

        time.sleep(min(0.02 + waited / 4, 0.5))


# -- Writing revisions -----------------------------------------------------------------


class _Request(NamedTuple):
    """What :meth:`Alembic.revision` was asked for."""

    message: str
    empty: bool
    branch: str
    parent: Any
    splice: bool
    depend: Any
    label: Any
    path: Any
    rev_id: str | None


def _read_text(path: str) -> str:
    """The text of a file, however a version control system has ended the lines."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _make_folders(settings: _Settings, metadatas: _Options) -> None:
    """Make what is missing; replace Alembic's own template by that for several."""
    templates = _folder("", "alembic:templates", "")  # without importing it
    generic = f"{templates}/generic/script.py.mako"

    try:
        for folder in (settings.home, *settings.locations):
            os.makedirs(folder, exist_ok=True)

        present = _read_text(settings.template)

        if len(metadatas) > 1 and present in ("", _read_text(generic)):
            shutil.copyfile(f"{templates}/multidb/script.py.mako", settings.template)
        elif not present:
            shutil.copyfile(generic, settings.template)
    except OSError as error:
        raise FlaskAlembicError(f"Cannot write '{settings.home}': {error}.") from error


def _check_template(extension: Alembic) -> None:
    """Refuse a template that would write a file without its operations."""
    template = extension._get_cache().settings.template
    names = extension.metadatas
    # What Alembic's templates, and those that follow them, render operations by.
    is_for_several = "_upgrades" in _read_text(template)

    if len(names) > 1:
        if not is_for_several:
            raise FlaskAlembicError(
                f"'{template}' is for one database: rename it, run {_typed('mkdir')}."
            )

        if not "".join(names).isidentifier():
            raise FlaskAlembicError(
                f"{_quoted(names)} cannot be in names of functions."
            )
    elif is_for_several:
        db = current_app.extensions.get("sqlalchemy")
        pairs = '"default": db.metadata'

        for bind in filter(None, getattr(db, "metadatas", ())):
            pairs += f', "{bind}": db.metadatas["{bind}"]'

        raise FlaskAlembicError(
            f"'{template}' is for several databases: rename it and run"
            f" {_typed('mkdir')}, or write Alembic(metadatas={{{pairs}}})."
        )


def _write_revision(session: _Session, request: _Request) -> list[Script]:
    """Write revision files: Alembic's own way, without its printing."""
    from alembic.autogenerate import RevisionContext

    extension = session.extension
    extension.mkdir()
    _check_template(extension)
    config = session.config
    # Templates ask for them; a subclass may have made the configuration.
    config.set_main_option("databases", ", ".join(extension.metadatas))
    arguments = _revision_arguments(session, request)
    revisions: Any = RevisionContext(config, extension.script_directory, arguments)
    made = revisions.generated_revisions

    if not request.empty:
        _compare(session, revisions)

        if not any(ops.ops for each in made for ops in each.upgrade_ops_list):
            return []

    try:
        # Alembic tells on stdout of each file and of its hooks; only commands print.
        with redirect_stdout(io.StringIO()):
            written = list(revisions.generate_scripts())
    except OSError as error:
        raise FlaskAlembicError(f"The revision cannot be made: {error}.") from error

    # It holds files that its signature lacks, and they may be deleted again.
    extension._get_cache().script = None

    for each in made:
        _tell_doubts(each.upgrade_ops_list)

    return written


def _compare(session: _Session, revisions: Any) -> None:
    """Fill revisions from the databases, unless one is behind or has no models."""
    for name, state in _known_status(session).items():
        if state.pending:
            raise _command_error(
                f"Database '{name}' is behind by {len(state.pending)}: run"
                f" {_typed('upgrade')}."
            )

        tables = _tables_without_models(session.extension, session.databases[name])

        if tables:
            raise FlaskAlembicError(
                f"The metadata of database '{name}' has no table, but the database has"
                f" {_quoted(tables)}: import the models, or give --empty."
            )

        context = session.extension.migration_contexts[name]

        with _comparing(session, context):
            revisions.run_autogenerate(tuple(x.revision for x in state.heads), context)


def _revision_arguments(session: _Session, request: _Request) -> _Options:
    """What Alembic's own command would have been given, after a look at it."""
    script = session.extension.script_directory
    branch = request.branch
    labels = {*_as_list(request.label)}
    named = _labels(script)
    taken = {*named, *_revisions_by_id(script), "base", "head", "heads"}
    rev_id = request.rev_id
    parents = _find_parents(session, script, request)
    depends = []

    # A history from elsewhere goes on without a label.
    if branch not in named and not (branch == "default" and parents):
        labels.add(branch)

    if rev_id is None:
        rev_id = str(session.extension.rev_id())

        # Two revisions within a second have one number.
        while rev_id.isdecimal() and rev_id in taken:
            rev_id = f"{int(rev_id) + 1:0{len(rev_id)}}"

    _check_names(rev_id, labels, taken)

    if request.depend:
        depends = _scripts(script, request.depend)

        if not depends:
            raise _command_error(f"{request.depend!r} cannot be depended on.")

    # It starts a docstring, and never becomes code.
    message = str(request.message or "").replace("\\", r"\\").replace('"', r"\"")
    return {
        "message": message,
        "sql": False,
        "rev_id": rev_id,
        "head": [each.revision for each in parents],
        "splice": request.splice,
        "branch_label": sorted(labels) or None,
        "version_path": _location(session.settings, request),
        "depends_on": [each.revision for each in depends],
    }


def _find_parents(session: _Session, script: Any, request: _Request) -> list[Script]:
    """What the revision follows: what was named, or the head of its branch."""
    named = _labels(script)

    if request.parent != "head":
        return _scripts(script, request.parent)

    if request.branch in named:
        return _scripts(script, f"{request.branch}@head")

    if request.branch != "default":
        return []

    # A history from elsewhere has no labels: its head is the default branch's.
    found = [each for each in session.extension.heads() if not each.branch_labels]

    if len(found) > 1:
        raise _several_heads(each.revision for each in found)

    others = named - session.settings.folders.keys()

    if others and not found:
        raise _command_error(
            f"Continue {_quoted(others)} by '-b', or begin anew by '-p base'."
        )

    return found


def _check_names(rev_id: str, labels: set[Any], taken: set[str]) -> None:
    """Refuse an id or labels that would break the history."""
    # For ids, the column has 32 characters, and Alembic refuses a '-'. A label that
    # ends as '-2' does would be taken for a count.
    form = r"(?!.*-\d+$)\w[\w.-]{0,31}"

    for name in (rev_id, *labels):
        if not isinstance(name, str) or name in taken or not re.fullmatch(form, name):
            raise _command_error(f"{name!r} is taken, or can be no id or branch.")

        taken.add(name)


def _location(settings: _Settings, request: _Request) -> str:
    """The version location to write to."""
    folders = settings.folders

    if request.path is None:
        return folders.get(request.branch, folders[None])

    return _folder(current_app.root_path, request.path, "path")


@contextmanager
def _comparing(session: _Session, context: Any) -> _Block:
    """Let the user's hooks find ``alembic.context``, as in a run of migrations."""
    # Not as an option: a callable there makes Alembic fail on computed columns, and
    # the user's, if there is one, has answered before.
    context.impl.compare_server_default = partial(_is_default_changed, context.impl)

    if _turn.is_taken:  # within a revision, whose own environment must stay
        yield
        return

    connection = context.connection

    with _taking_turn(session), context.environment_context, _reading(connection):
        yield


def _tables_without_models(extension: Alembic, database: _Database) -> set[str]:
    """The tables that would be dropped because the metadata has none at all."""
    if any(each.tables for each in _as_list(database.metadata)):
        return set()

    diffs = extension.compare_metadata(database.name)
    return {diff[1].name for diff in diffs if diff[0] == "remove_table"}


def _produce_migrations(session: _Session) -> MigrationScript:
    from alembic.autogenerate import produce_migrations

    scripts = []

    for context in session.extension.migration_contexts.values():
        with _comparing(session, context):
            scripts.append(produce_migrations(context, context.opts["target_metadata"]))

    made = scripts.pop(0)

    for script in scripts:
        made.upgrade_ops_list.extend(script.upgrade_ops_list)
        made.downgrade_ops_list.extend(script.downgrade_ops_list)

    return made


def _tell_doubts(operations: list[Any]) -> None:
    """Tell what deserves a look in a file that was written."""
    from alembic.operations import ops

    for each in operations:
        column = getattr(each, "column", None)
        lost = ""

        if isinstance(each, ops.OpContainer):
            _tell_doubts(each.ops)
        elif isinstance(each, ops.DropTableOp):
            lost = f"table '{each.table_name}'"
        elif isinstance(each, ops.DropColumnOp):
            lost = f"column '{each.table_name}.{each.column_name}'"
        elif column is not None and not column.nullable and not column.server_default:
            _logger.info(
                f"Look at it: column '{each.table_name}.{column.name}' is NOT NULL"
                " without a server default, which fails where the table has rows."
            )

        if lost:
            _logger.info(
                f"Look at it: {lost} is dropped, and its data is lost. A rename?"
            )


def _context_options(session: _Session, name: str) -> _Options:
    """All ``configure`` options of one database, with our hooks."""
    database = session.databases[name]
    options = database.options | {
        "target_metadata": database.metadata,
        "database": name,
        "include_object": partial(_include_object, database, session.settings),
        "render_item": partial(_render_item, database.options.get("render_item")),
    }

    if len(session.all_databases) > 1:
        token = name

        if name == "default" and "bind_names" in _read_text(session.settings.template):
            token = ""  # Flask-Migrate has no 'default'

        options["upgrade_token"] = f"{token}_upgrades"
        options["downgrade_token"] = f"{token}_downgrades"

    return options


def _include_object(
    database: _Database, settings: _Settings, obj: Any, name: Any, kind: str, *args: Any
) -> bool:
    """Leave excluded tables alone, after the user's callable has answered."""
    theirs = database.options.get("include_object")

    if theirs and not theirs(obj, name, kind, *args):
        return False

    if kind != "table":
        return True

    schema = obj.schema or database.engine.dialect.default_schema_name

    for pattern in (
        "*alembic_version*",
        database.options["version_table"],
        *settings.exclude_tables,
    ):
        subject = name

        if "." in pattern:
            subject = f"{schema}.{name}"

        if fnmatchcase(subject, pattern):
            return False

    return True


def _render_item(theirs: Any, kind: str, item: Any, context: Any) -> Any:
    """Import the module of a type of the user's, whose callable answers first."""
    code = theirs(kind, item, context) if theirs else False
    module = type(item).__module__

    if code is False and kind == "type" and not module.startswith("sqlalchemy."):
        context.imports.add(f"import {module}")

    return code


def _is_default_changed(impl: Any, found: Any, column: Any, new: Any, old: Any) -> Any:
    """Compare two quoted literals, as Alembic's own question fails on some of them."""
    literal = r"\(?('(?:[^']|'')*')(?:::[\w .\"]+)?\)?"
    rendered = str(new)

    # Alembic hands on a string as it is, and a text() as it is written in SQL.
    if isinstance(getattr(column.server_default, "arg", None), str):
        escaped = rendered.replace("'", "''")
        rendered = f"'{escaped}'"

    former = re.fullmatch(literal, str(old))
    wanted = re.fullmatch(literal, rendered)

    if former and wanted:
        if former[1] == wanted[1]:
            return False

        # Of other types, the server may write one value in many ways.
        if isinstance(found.type, sa.String) or str(found.type) == "JSON":
            return True

    return type(impl).compare_server_default(impl, found, column, new, old)


# -- Quick look ------------------------------------------------------------------------
# Most starts have nothing to upgrade, and the text of the revision files says so,
# without importing Alembic or running a file. In any doubt, Alembic is asked.

_ID = r"""["'][\w.-]+["']"""
_IDS = rf"(None|{_ID}|[(\[](?:{_ID},[ ]?)*(?:{_ID})?[)\]])"
#: The lines that templates write: plain values, without a comment or a second line.
_IDENTIFIERS = rf"""(?mx)
    ^revision\b      [^=\n]* =[ ]* ({_ID}) \n+
    ^down_revision\b [^=\n]* =[ ]* {_IDS}  \n+
    ^branch_labels\b [^=\n]* =[ ]* {_IDS}  \n+
    ^depends_on\b    [^=\n]* =[ ]* {_IDS}  $
"""
#: What may change one of them elsewhere.
_SECOND = r"down_revision|branch_labels|depends_on|revision\b[^=\n()]*=(?!=)"


def _is_current(session: _Session) -> bool:
    """Whether surely nothing is to run; an import that would fail goes unseen."""
    settings = session.settings
    odd = settings.sections["alembic"].keys() & {
        "sourceless",
        "recursive_version_locations",
    }
    # A subclass may see to it that other files or tables are looked at.
    asked = (type(session.extension), session.job.kind, session.job.target)

    if odd or asked != (Alembic, "upgrade", "heads"):
        return False

    found = []

    for name, database in session.databases.items():
        connection = session.connect(name)

        if connection.in_transaction():
            return False  # a query that fails would end the caller's transaction

        try:
            with _reading(connection):
                found.append(_rows_of(database, connection))
        except exc.DBAPIError:
            return False

    # The files cost most, so they are read last.
    heads = _quick_heads(settings.locations)
    return all(rows == heads for rows in found)


def _quick_heads(locations: _Names) -> set[str] | None:
    """The version table's rows when all is done; ``None``: Alembic must be asked."""
    from graphlib import TopologicalSorter

    below: dict[str, list[str]] = {}
    covered: set[str] = set()

    try:
        for entry in _revision_files(locations):
            id_, *parents = _read_ids(_read_text(entry.path))
            covered.update(parents)

            if id_ in below or entry.is_symlink():
                return None

            below[id_] = parents

        TopologicalSorter(below).prepare()  # fails if there is a loop
    except (OSError, ValueError):
        return None  # whatever it is, Alembic says it better

    if covered - below.keys():
        return None  # one is missing, or is a label or a prefix

    return below.keys() - covered  # dependencies have no row: "real heads"


def _revision_files(locations: _Names) -> cabc.Iterator[Any]:
    """The files that Alembic loads, and all links: it goes by where they lead to."""
    for location in filter(os.path.isdir, locations):
        for entry in list(os.scandir(location)):
            is_python = re.match(r"(?!\.#|__init__).*\.py$", entry.name)

            if entry.is_symlink() or (is_python and entry.is_file()):
                yield entry


def _read_ids(text: str) -> list[str]:
    """The id of a revision, then those that it follows or depends on."""
    found = re.search(_IDENTIFIERS, text)

    if found is None:
        raise ValueError("not as templates write it")

    if re.search(_SECOND, text.replace(found[0], "")):
        raise ValueError("what is assigned may be changed")

    values = f"{found[1]} {found[2]} {found[4]}"  # without the labels
    return re.findall(r"[\w.-]+(?=[\"'])", values)


# -- Commands --------------------------------------------------------------------------
# Each parses, calls methods and prints what they return; any can be mounted anywhere.

_VERBOSE = "flask_alembic.verbose"


class _Command(click.Command):
    """Takes counts for arguments, and makes one line of an error of the user's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # With a space before it, Click takes '-2' for no option.
        return super().parse_args(ctx, [re.sub(r"^-\d", r" \g<0>", x) for x in args])

    def invoke(self, ctx: click.Context) -> Any:
        is_verbose = ctx.meta[_VERBOSE] = ctx.params.pop("verbose")

        try:
            with _shown("flask_alembic"), _shown("alembic", logging.WARNING):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # That of an event loop stands for a cancellation, which has the notes.
            _say("\n".join(_notes(error) or _notes(error.__context__)))
            raise
        except (Exception, SystemExit) as error:
            of_click = (click.ClickException, click.exceptions.Exit, BrokenPipeError)

            if isinstance(error, of_click) and not _notes(error):
                raise  # else a revision raised it

            if is_verbose:
                _say(traceback.format_exc().rstrip())

            raise click.ClickException(_error_text(error)) from error


def _notes(error: object) -> list[str]:
    return getattr(error, "__notes__", [])


def _error_text(error: BaseException) -> str:
    """One line, or what a revision raised: its own frames, the error and the notes."""
    from alembic.util import CommandError

    notes = _notes(error)
    text = "\n".join([_one_line(getattr(error, "orig", error)), *notes])

    if isinstance(error, (FlaskAlembicError, CommandError)):
        return text

    for note in notes:
        if note.startswith(_NO_CONNECTION):
            return note

    locations = _extension()._get_cache().settings.locations
    trace = traceback.TracebackException.from_exception(error)
    own = [each for each in trace.stack if os.path.dirname(each.filename) in locations]

    if own:
        trace.stack[:] = own
    elif isinstance(error, exc.DBAPIError):
        return f"The database cannot be used: {text}"

    return "".join(trace.format(chain=not own)).rstrip()


@contextmanager
def _shown(name: str, level: int = logging.INFO) -> _Block:
    """Send a logger's lines to stderr; Alembic's only if the application does not."""
    logger = logging.getLogger(name)
    former = vars(logger).copy()

    is_seen = logging.root.handlers and logger.isEnabledFor(level)

    if logger is _logger or not is_seen:
        logger.handlers = [logging.StreamHandler()]
        logger.propagate = False
        logger.disabled = False  # as 'dictConfig' leaves it
        logger.setLevel(level)

    try:
        yield
    finally:
        vars(logger).update(former)
        logger.setLevel(logger.level)  # forgets levels it looked up


def _say(text: str) -> None:
    """Tell on stderr. That nobody can read it must not stop a migration."""
    try:
        click.echo(text, err=True)
    except (OSError, ValueError):
        sys.stderr = None  # or Python tries again when it exits, and fails


def _extension() -> Any:
    return _set_up("alembic")


def _given(options: _Options) -> _Options:
    """The options that were given: the method of a subclass may take no others."""
    return {key: value for key, value in options.items() if value}


#: The commands, for applications that mount them under a group of their own.
cli: AppGroup = AppGroup("db", help="Perform database migrations.")
_command = partial(cli.command, cls=_Command)
_flag = partial(click.option, is_flag=True)
_list = partial(click.option, multiple=True)

_verbose = _flag("-v", "--verbose", help="Show more, and the traceback of an error.")
_database = _list("-n", "--database", help="Database to work on. Can be repeated.")
_message = click.option("-m", "--message", help="What the revision does.")
_label = _list("-l", "--label", "--branch-label", help="Branch label. Can be repeated.")
_rev_id = click.option("--rev-id", help="Its revision id, instead of a timestamp.")
_splice = _flag("--splice", help="Allow a parent that is not a head.")
_sql = _flag("--sql", help="Print the SQL script instead of running it.")
_tag = click.option("--tag", help="Value of context.get_tag_argument().")
_x = _list("-x", "--x-arg", "x", help="KEY=VALUE of get_x_argument(). Can be repeated.")
_quiet = _flag("-q", "--quiet", help="Show no progress.")


@_command("mkdir")
@_verbose
def _db_mkdir() -> None:
    """Make the migrations folder, if it is missing (alias: init)."""
    _extension().mkdir()
    _say(f"'{_extension()._get_cache().settings.home}' is ready.")


@_command("revision")
@click.argument("text", metavar="[MESSAGE]", default="")
@_message
@_flag("--empty", help="Write an empty revision; compare nothing.")
@click.option("-b", "--branch", help="Branch to continue, or to start.")
@_list("-p", "--parent", "--head", help="What it follows. Can be repeated.")
@_splice
@_list(
    "-d", "--depend", "--depends-on", help="Revision to run before it. Can be repeated."
)
@_label
@click.option("--path", "--version-path", help="Version location to write to.")
@_rev_id
@_flag("--autogenerate", hidden=True, expose_value=False)  # as it does anyhow
@_x
@_database
@_verbose
def _db_revision(text: str, message: str | None, **options: Any) -> None:
    """Write a revision from what changed in models (alias: migrate).

    MESSAGE says what. The databases, which the models are compared with, have to be
    up to date. Review the file. When nothing changed, none is written.
    """
    if text and message:
        raise click.UsageError("Give the message either as MESSAGE or with '-m'.")

    _tell_env_file()

    with _shown("alembic.autogenerate"):
        made = _extension().revision(message or text, **_given(options))

    for script in made:
        click.echo(script.path)

    if not made:
        _say("No changes detected. Are all models imported? --empty writes a revision.")


def _tell_env_file() -> None:
    """Tell of Flask-Migrate's file, which has no say here."""
    path = f"{_extension()._get_cache().settings.home}/env.py"

    if os.path.isfile(path):
        _say(
            f"'{path}' is not run: what it sets belongs in ALEMBIC and ALEMBIC_CONTEXT."
        )


@_command("merge")
@click.argument("revisions", nargs=-1)
@_message
@_label
@_rev_id
@_splice
@_verbose
def _db_merge(revisions: Any, **options: Any) -> None:
    """Write a revision that joins REVISIONS, by default all heads."""
    click.echo(_extension().merge(revisions or "heads", **_given(options)).path)


@_command("upgrade")
@click.argument("target", default="heads")
@_sql
@_flag("--allow-newer", help="Leave databases alone that a newer release has migrated.")
@_quiet
@_tag
@_x
@_database
@_verbose
def _db_upgrade(target: str, **options: Any) -> None:
    """Run the revisions that lead up to TARGET, by default to all heads.

    TARGET is a revision id or its beginning, 'head', 'BRANCH@head', or steps: '+2'.
    --sql takes [START:]TARGET; START is 'base', or 'current' to ask the database.
    """
    _run("upgrade", [target], **options)


@_command("downgrade")
@click.argument("target", default="-1")
@_sql
@_quiet
@_tag
@_x
@_database
@_verbose
def _db_downgrade(target: str, **options: Any) -> None:
    """Undo the last revision, or all down to TARGET, by default '-1'.

    TARGET is a revision id or its beginning, 'base', 'BRANCH@base', or steps: '-2',
    'BRANCH@-1'. --sql takes START:TARGET; START may be 'current', to ask.
    """
    if options["sql"] and not re.match(".+:", target):
        raise click.UsageError("'--sql' needs START:TARGET here, as 'current:-1'.")

    _run("downgrade", [target], **options)


@_command("stamp")
@click.argument("targets", nargs=-1)
@_flag("--purge", help="Delete all rows of the version table first.")
@_sql
@_tag
@_x
@_database
@_verbose
def _db_stamp(targets: Any, **options: Any) -> None:
    """Write TARGETS, by default 'heads', into the version table; run nothing.

    TARGETS are revision ids or their beginnings, 'heads', 'base' or 'BRANCH@head'.
    Rows of branches not named stay. With --sql, the first may be START:TARGET.
    """
    if options["sql"] and options["purge"]:
        raise click.UsageError("Give either '--sql' or '--purge'.")

    # Where '_run' has printed a script, it returns None.
    _echo_scripts(_run("stamp", targets or ["heads"], **options) or ())


def _run(verb: str, targets: Any, sql: bool, quiet: bool = True, **options: Any) -> Any:
    """Upgrade, downgrade or stamp, and tell of it; with --sql, print the script."""
    alembic = _extension()
    given = _given(options)
    # Stripped of the space that '-2' was given.
    start, colon, target = targets[0].strip().rpartition(":")

    if not target or (colon and not sql):
        raise click.UsageError(f"'{targets[0]}' is no target; START: needs '--sql'.")

    if targets[1:]:
        target = [target, *targets[1:]]

    if sql:
        given.pop("allow_newer", None)
        make = getattr(alembic, f"{verb}_sql")
        scripts = make(target, start or "base", **given)

        for name, text in scripts.items():
            if len(scripts) > 1:
                click.echo(f"-- Database: {name}\n")

            click.echo(f"{text.rstrip()}\n")

        return None

    method = getattr(alembic, verb)

    # An override with the predecessor's signature takes none, and returns none.
    if not quiet and "progress" in inspect.signature(method).parameters:
        given["progress"] = partial(_tell_progress, len(alembic.databases) > 1)

    began = time.perf_counter()
    done = method(target, **given)

    if quiet or done is None:
        return done

    took = f"{time.perf_counter() - began:.2f}s"
    _say(f"{len(done)} {verb}d in {took}." if done else "Nothing to do.")


def _tell_progress(
    has_others: bool, name: str, script: Script, place: int, count: int, took: float
) -> None:
    line = f"{place:>3}/{count}"

    if has_others:
        line += f"  {name}"

    id_ = click.style(script.revision, "cyan")
    _say(f"{line}  {id_}  {_summary(script)} ... {took:.2f}s")


@_command("status")
@_flag("--json", help="Print JSON.")
@_database
@_verbose
def _db_status(json: bool, **options: Any) -> None:
    """Show where each database stands, and what is pending."""
    from json import dumps

    states = _extension().status(**_given(options))
    data: _Options = {}

    for name, state in states.items():
        if json:
            pending = [
                {"revision": x.revision, "message": _summary(x), "path": x.path}
                for x in state.pending
            ]
            data[name] = state._asdict() | {"pending": pending}
            continue

        click.echo(f"{name}: {_status_words(state)}")

        for kind in ("current", "heads", "pending"):
            for script in getattr(state, kind):
                click.echo(f"  {kind:<7}  {script.revision}  {_summary(script)}")

    if json:
        click.echo(dumps({"databases": data}, indent=2, default=lambda x: x.revision))


def _status_words(state: DatabaseStatus) -> str:
    if state.unknown:
        return f"unknown ids: {', '.join(state.unknown)}"

    if not state.heads:
        return f"no revisions yet\n  {_typed('revision MESSAGE')} makes the first"

    if state.pending:
        return f"{len(state.pending)} pending"

    return "up to date"


@_command("current")
@_flag("-c", "--check-heads", help="Exit with 1 unless all heads are there.")
@_database
@_verbose
def _db_current(check_heads: bool, database: Any) -> None:
    """Show the revisions that each database is at."""
    alembic = _extension()
    names = database or alembic.databases

    for name in names:
        if len(names) > 1:
            click.echo(f"Database: {name}")

        _echo_scripts(alembic.current(name))

    if check_heads and alembic.needs_upgrade(names):
        click.echo("Database is not on all head revisions")
        raise click.exceptions.Exit(1)


@_command("check")
@_database
@_verbose
def _db_check(database: Any) -> None:
    """Exit with 1 if models and databases differ, or a branch has several heads."""
    alembic = _extension()
    _tell_env_file()
    branches: _Options = {}

    for head in alembic.heads():
        for branch in head.branch_labels or ["default"]:
            branches.setdefault(branch, []).append(head.revision)

    lines = [str(_several_heads(ids)) for ids in branches.values() if len(ids) > 1]

    for name in database or alembic.databases:
        alembic.current(name)  # an unknown id is an error
        diffs = alembic.compare_metadata(name)

        if _tables_without_models(alembic, _find_databases(alembic)[name]):
            lines.append(
                f"Database '{name}' has tables, its metadata none: import the models."
            )

        if diffs:
            lines.append(f"Changes detected in database '{name}':")
            lines.extend(f"  {_words_of(diff)}" for diff in diffs)

    click.echo("\n".join(lines or ["No changes detected."]))

    if lines:
        raise click.exceptions.Exit(1)


def _words_of(diff: Any) -> str:
    """A difference, as Alembic's tuples have it, in words."""
    if isinstance(diff, list):  # of one column
        return "\n  ".join(map(_words_of, diff))

    kind = diff[0].replace("_", " ")
    parts = [getattr(each, "name", each) for each in diff[1:4]]
    name = ".".join(each for each in parts if isinstance(each, str))
    return f"{kind} '{name}'"


@_command("heads")
@_flag("--resolve-dependencies", help="Leave out heads that others depend on.")
@_verbose
def _db_heads(resolve_dependencies: bool) -> None:
    """Show the revisions that no other follows."""
    _echo_scripts(_extension().heads(resolve_dependencies))


@_command("branches")
@_verbose
def _db_branches() -> None:
    """Show the revisions that several others follow; with -v, which."""
    _echo_scripts(_extension().branches())


@_command("log")
@click.option("--start", help="Oldest revision to show.")
@click.option("--end", help="Newest revision to show.")
@click.option("-r", "--rev-range", metavar="A:B", help="Short for --start A --end B.")
@_flag("-i", "--indicate-current", help="Mark the current revisions.")
@_database
@_verbose
def _db_log(
    start: str, end: str, rev_range: str, indicate_current: bool, **options: Any
) -> None:
    """Show the history, newest first (alias: history).

    Either end is a revision id or its beginning, or 'BRANCH@head'.
    """
    alembic = _extension()
    marked = alembic.current(**_given(options)) if indicate_current else ()

    if rev_range:
        start, _, end = rev_range.partition(":")

    _echo_scripts(alembic.log(start or "base", end or "heads"), marked)


@_command("show")
@click.argument("revisions", nargs=-1)
@_database
@_verbose
def _db_show(revisions: Any, **options: Any) -> None:
    """Show REVISIONS (ids, 'BRANCH@head', 'current') in full, by default 'head'."""
    alembic = _extension()
    click.get_current_context().meta[_VERBOSE] = True

    for name in revisions or ["head"]:
        if name == "current":
            _echo_scripts(alembic.current(**_given(options)))
        else:
            _echo_scripts(_scripts(alembic.script_directory, name))


@_command("edit")
@click.argument("revision", default="head")
@_verbose
def _db_edit(revision: str) -> None:
    """Open REVISION, by default 'head', in the editor of $EDITOR."""
    for script in _scripts(_extension().script_directory, revision):
        click.edit(filename=script.path)


def _echo_scripts(scripts: Any, marked: Any = ()) -> None:
    """Show revisions as Alembic does; its own mark is state that threads share."""
    verbose = click.get_current_context().meta[_VERBOSE]

    for script in scripts:
        mark = " (current)" if script in marked else ""
        text = script.cmd_format(verbose, include_branches=True, include_parents=True)

        if verbose:
            click.echo(text.replace("\n", f"{mark}\n", 1))
        else:
            click.echo(f"{text}{mark}, {_summary(script)}".removesuffix(", "))


def _summary(script: Script) -> str:
    """The message in one line; without one, Alembic takes what follows for it."""
    return re.sub("^Revision ID: .*", "", _one_line(script.doc))


for _name, _alias in {"mkdir": "init", "revision": "migrate", "log": "history"}.items():
    _hidden = copy.copy(cli.commands[_name])
    _hidden.hidden = True
    cli.add_command(_hidden, _alias)
