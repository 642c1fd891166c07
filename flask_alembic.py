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
import contextlib
import copy
import dataclasses
import functools
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
import weakref
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from typing import Any
from typing import Final
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
    from alembic.operations import MigrationScript
    from alembic.operations import Operations
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.runtime.migration import RevisionStep
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
StepFunction: TypeAlias = "cabc.Callable[[Any, MigrationContext], cabc.Iterable[Any]]"
#: One revision or several: ids, unique prefixes, scripts, symbols (``users@head``).
RevisionTarget: TypeAlias = "str | int | Script | cabc.Sequence[str | Script]"
DatabaseNames: TypeAlias = "str | cabc.Sequence[str] | None"
XArguments: TypeAlias = "cabc.Mapping[str, Any] | cabc.Sequence[str] | str | None"
MetadataOption: TypeAlias = "sa.MetaData | cabc.Sequence[sa.MetaData]"
EngineOption: TypeAlias = "sa.Engine | AsyncEngine"
#: Is told database, revision, its place, their number, and the seconds that it took.
Progress: TypeAlias = "cabc.Callable[[str, Script, int, int, float], object]"

_logger: Final = logging.getLogger("flask_alembic")

#: Our own keys of ``app.config["ALEMBIC"]``, which Alembic is not given.
_OWN_KEYS: Final[dict[str, Any]] = {
    "migration_lock": True,
    "migration_lock_timeout": 300,
    "lock_timeout": None,
    "exclude_tables": [],
}
_NO_CONNECTION: Final = "Cannot connect to database"


class RunOptions(TypedDict, total=False):
    """What methods that talk to databases take beside their target."""

    database: DatabaseNames  #: A name or several; all when left out.
    tag: str | None  #: For ``context.get_tag_argument()`` in revisions.
    x: XArguments  #: For ``context.get_x_argument()``: a dict, or ``KEY=VALUE``.


class DatabaseStatus(NamedTuple):
    """Where one database stands, as :meth:`Alembic.status` reports it."""

    current: tuple[Script, ...]  #: Revisions in the version table.
    heads: tuple[Script, ...]  #: Revisions that an upgrade leads to.
    pending: tuple[Script, ...]  #: What it runs, in order; none if ids are unknown.
    unknown: tuple[str, ...]  #: Ids in the version table that no revision file has.


def _by_name(given: Any) -> dict[str, Any]:
    """An argument as a dict: what is no dict belongs to the ``default`` database."""
    by_name = given if isinstance(given, dict) else {"default": given}
    return {name: each for name, each in by_name.items() if each is not None}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []

    return [*value] if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _quoted(names: cabc.Iterable[Any]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(map(str, names)))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


# -- Errors ----------------------------------------------------------------------------


class FlaskAlembicError(RuntimeError):
    """Set-up or configuration is missing or wrong, or going on would not be safe."""


class MigrationLockTimeout(FlaskAlembicError):
    """Another held the migration lock of ``database`` for all of ``seconds``."""

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
        *others: object,
        run_mkdir: bool = True,
        command_name: str = "db",
        metadatas: MetadataOption | cabc.Mapping[str, MetadataOption] | None = None,
        engines: EngineOption | cabc.Mapping[str, EngineOption] | None = None,
    ) -> None:
        if others:
            raise TypeError(
                "Write 'Alembic(app)': the engines of Flask-SQLAlchemy and"
                " Flask-SQLAlchemy-Lite are found; all else is passed by its name."
            )

        self.run_mkdir = run_mkdir
        self.command_name = command_name
        self.metadatas: dict[str, MetadataOption] = _by_name(metadatas)  #: By database.
        self.engines: dict[str, EngineOption] = _by_name(engines)  #: By database.
        self._caches = weakref.WeakKeyDictionary[Flask, _Cache]()

        if app is not None:
            self.init_app(app)

    def init_app(
        self, app: Flask, run_mkdir: bool | None = None, command_name: str | None = None
    ) -> None:
        """Set up an application: its defaults, commands and (if it can be) folder."""
        name = self.command_name if command_name is None else command_name
        app.extensions["alembic"] = self
        self._caches[app] = _Cache(self, name)
        _fill_in_defaults(app)
        app.teardown_appcontext(self._close_context)

        if name:
            app.cli.add_command(cli, name)

        if self.run_mkdir if run_mkdir is None else run_mkdir:
            settings = _read_settings(app)  # not kept, for it may be changed yet

            with contextlib.suppress(FlaskAlembicError):
                _make_folders(settings, self.metadatas)

    @property
    def config(self) -> Config:
        """Alembic's configuration of the current application."""
        from alembic.config import Config

        cache = self._get_cache()

        if cache.config is None:
            config = Config()
            config.file_config.read_dict(cache.settings.sections)
            cache.config = config  # at last, for other threads may use it at once

        return cache.config

    @property
    def script_directory(self) -> ScriptDirectory:
        """The revision files; read again when one was added, removed or changed."""
        return self._get_cache().load(self.config)

    @property
    def environment_context(self) -> EnvironmentContext:
        """Alembic's environment of the ``default`` or only database."""
        from alembic.runtime.environment import EnvironmentContext

        session = self._session()

        if session.environment is None:
            script = self.script_directory
            environment = EnvironmentContext(session.config, script, tag=session.tag)
            session.environment = environment

        return session.environment

    @property
    def migration_contexts(self) -> dict[str, MigrationContext]:
        """A migration context per database, connected until the app context ends."""
        session = self._session()
        names = session.databases.keys()

        for name in names - session.contexts.keys():
            environment = self.environment_context

            if name != "default" and len(names) > 1:
                environment = type(environment)(environment.config, environment.script)

            options = _context_options(session, name)
            environment.configure(session.connect(name), **options)
            session.contexts[name] = environment.get_context()

        return {name: session.contexts[name] for name in names}

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
        :param path: Version location to write to: a folder, or the name of a branch.
        :param rev_id: Its id, in place of one that :meth:`rev_id` makes.
        :return: The new revisions; none when autogenerate finds nothing.
        """
        request = _Request(
            message, empty, branch, parent, splice, depend, label, path, rev_id
        )
        # Without a database to ask, none is looked for.
        settings = self._get_cache().settings
        connects = not empty or settings.is_on("revision_environment")
        work = functools.partial(_write_revision, request=request, connects=connects)
        return self._call(work, connects=connects, **options)

    def merge(
        self,
        revisions: RevisionTarget = "heads",
        message: str | None = None,
        label: str | cabc.Sequence[str] | None = None,
        *,
        rev_id: str | None = None,
        splice: bool = False,
    ) -> Script:
        """Write a revision that joins others, in the folder of the first of them.

        :param revisions: At least two; ``users@head`` is the head of a branch.
        :param message: First line of the file; ``merge heads`` when left out.
        :param label: Branch labels for it.
        :param rev_id: Its id, in place of one that :meth:`rev_id` makes.
        :param splice: Allow revisions that are not heads.
        """
        parents = _scripts(self.script_directory, revisions)

        if len(parents) < 2:
            raise _command_error(f"{revisions!r}: a merge needs two revisions.")

        options: Any = {"splice": splice, "label": label, "rev_id": rev_id}
        text = "merge heads" if message is None else message
        # Not by an override, which may refuse parents that a merge can have.
        return Alembic.revision(self, text, empty=True, parent=parents, **options)[0]

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
        return self._call(_migrate, job=job, **options)

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
        return self._call(_migrate, job=job, **options)

    def stamp(
        self,
        target: RevisionTarget = "heads",
        *,
        purge: bool = False,
        **options: Unpack[RunOptions],
    ) -> tuple[Script, ...]:
        """Write ``target`` as if it had run; a branch that is not named keeps its row.

        :param target: One revision or several.
        :param purge: Delete all rows first, also those that no revision file has.
        :return: The revisions that are current now.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        self._call(_migrate, job=_Job("stamp", target, purge=purge), **options)
        return self.current(options.get("database"))

    def run_migrations(self, fn: StepFunction, **kwargs: Any) -> None:
        """Run steps on the databases: the one way of every migration.

        All locks are taken, then all transactions opened, the steps run, all committed;
        on SQLite each revision is a transaction of its own. The error of a run that
        failed has a note that says where each database stands.

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
        """Make an upgrade's SQL, by database; only to read ``current`` it connects."""
        return self._call(_run_offline, job=_Job("upgrade", target, start), **options)

    def downgrade_sql(
        self, target: RevisionTarget, start: str, **options: Unpack[RunOptions]
    ) -> dict[str, str]:
        """Make the SQL script of a downgrade, by database name."""
        return self._call(_run_offline, job=_Job("downgrade", target, start), **options)

    def stamp_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make the SQL script of a stamp, by database name."""
        return self._call(_run_offline, job=_Job("stamp", target, start), **options)

    def current(self, database: DatabaseNames = None) -> tuple[Script, ...]:
        """Get the revisions in the version tables; an unknown id is an error."""
        return self._call(_current, database=database)

    def heads(self, resolve_dependencies: bool = False) -> tuple[Script, ...]:
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
        """Get the revisions from ``end`` to ``start``; ``current`` reads databases."""
        script: Any = self.script_directory
        lower = _parse_target(script, self._end_of(start))
        upper = _parse_target(script, self._end_of(end))

        with _explained(script, lower), _explained(script, upper):
            return list(script.walk_revisions(lower.argument, upper.argument))

    def status(self, database: DatabaseNames = None) -> dict[str, DatabaseStatus]:
        """Tell where each database stands. Nothing is written, no table is made."""
        return self._call(_status, database=database)

    def needs_upgrade(self, database: DatabaseNames = None) -> bool:
        """Tell whether :meth:`upgrade` would run anything; unknown ids are an error."""
        return self._call(_needs_upgrade, job=_Job("upgrade"), database=database)

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
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001

        if app not in self._caches:
            raise FlaskAlembicError("Not set up: call 'alembic.init_app(app)' first.")

        return self._caches[app]

    def _session(self) -> _Session:
        """The innermost session of this extension in this application context."""
        bases = g.setdefault("_flask_alembic", {})

        if self not in bases:
            bases[self] = _Session(self)

        inner = _innermost.get()

        if inner is not None and inner.base is bases[self]:
            return inner

        return bases[self]

    def _close_context(self, error: BaseException | None = None) -> None:
        session = g.get("_flask_alembic", {}).pop(self, None)

        if session is not None:
            session.close()

    def _call(
        self,
        work: cabc.Callable[[_Session], _R],
        *,
        job: _Job | None = None,
        connects: bool = True,
        **options: Unpack[RunOptions],
    ) -> _R:
        """Do a method's work in a session, in an event loop where a driver needs it."""
        session = _Session(self, self._session(), job, **options)

        def work_inside() -> _R:
            with session.entered():
                return work(session)

        if connects and any(x.is_async for x in session.databases.values()):
            return _in_event_loop(work_inside)

        return work_inside()

    def _end_of(self, target: RevisionTarget) -> Any:
        """One end of a range, where ``current`` is what the databases have."""
        return self.current() or "base" if target == "current" else target


# -- State -----------------------------------------------------------------------------
# A cache lives as long as an application; a session, as its method or context.


class _Loaded(NamedTuple):
    """The revision files, and what tells that they are still the same."""

    config: Config
    signature: list[Any]
    script: ScriptDirectory


class _Cache:
    """What is kept for one application: its configuration and its revision files."""

    config: Config | None = None
    loaded: _Loaded | None = None

    def __init__(self, extension: Alembic, command_name: str) -> None:
        self._extension = extension
        self.command_name = command_name

    @functools.cached_property
    def settings(self) -> _Settings:
        return _read_settings(current_app)

    def load(self, config: Config) -> ScriptDirectory:
        loaded = self.loaded

        if (
            loaded is None
            or loaded.config is not config
            or loaded.signature != _signature(loaded.script)
        ):
            loaded = _load_history(config)
            self.loaded = loaded

        return loaded.script

    def clear(self) -> None:
        """Forget all, and give back what this application context holds open."""
        self.config = None
        self.loaded = None
        self.__dict__.pop("settings", None)
        session: _Session | None = self._extension._session()

        while session is not None:
            session.close()
            session = session.outer


class _Session:
    """What one method, or one application context, works on and has open."""

    def __init__(
        self,
        extension: Alembic,
        outer: _Session | None = None,
        job: _Job | None = None,
        database: DatabaseNames = None,
        tag: str | None = None,
        x: XArguments = None,
    ) -> None:
        self.extension = extension
        self.outer = outer
        self.job = job or _Job()
        self.tag = tag
        self.x = (
            [f"{k}={v}" for k, v in x.items()]
            if isinstance(x, cabc.Mapping)
            else _as_list(x)
        )
        self.ran: dict[str, Script] = {}  #: What the last run completed, by id.
        self.environment: EnvironmentContext | None = None
        self.connections: dict[str, sa.Connection] = {}
        self.contexts: dict[str, MigrationContext] = {}
        self.base: _Session = self
        self._database = database
        self._open = contextlib.ExitStack()

        if outer is not None:
            self.base = outer.base
            # Only the innermost session opens anything: a copy knows all that is open.
            self.connections.update(outer.connections)
            self.contexts.update(outer.contexts)

    @property
    def settings(self) -> _Settings:
        return self.extension._get_cache().settings

    @property
    def config(self) -> Config:
        """Alembic's configuration with the arguments that revisions may ask for."""
        config: Any = self.extension.config

        if self.x:
            config = copy.copy(config)
            config.cmd_opts = self  # which Alembic asks for 'x' alone

        return config

    @functools.cached_property
    def target(self) -> _Target:
        """What the job is to reach."""
        sign = {"upgrade": "+", "downgrade": "-"}.get(self.job.kind, "")
        return _parse_target(self.extension.script_directory, self.job.target, sign)

    @functools.cached_property
    def all_databases(self) -> dict[str, _Database]:
        return _find_databases(self.extension)

    @functools.cached_property
    def databases(self) -> dict[str, _Database]:
        """The databases of this session: those that were asked for, or all."""
        found = self.all_databases

        if self._database is None:
            return found

        names = _as_list(self._database)

        if not names or {*names} - found.keys():
            raise _command_error(f"{_quoted(names)}: databases are {_quoted(found)}.")

        return {name: found[name] for name in found if name in names}

    def only(self, name: str) -> str:
        """The option that names a database, where there are several."""
        return f" -n {name}" if len(self.all_databases) > 1 else ""

    def connect(self, name: str) -> sa.Connection:
        """The connection to a database, opened when there is none."""
        if name not in self.connections:
            database = self.databases[name]

            if database.is_async and self.outer is None:
                raise FlaskAlembicError(f"'{name}' is async: use it in 'run_sync(fn)'.")

            self.open(name, database.is_async)

        return self.connections[name]

    def open(self, name: str, has_own_pool: bool) -> None:
        connecting = _connect(self.databases[name], has_own_pool)
        self.connections[name] = self._open.enter_context(connecting)

    def roll_back(self) -> None:
        """End what is open, as the end of the context would."""
        for connection in self.connections.values():
            connection.rollback()

    @contextlib.contextmanager
    def entered(self) -> cabc.Generator[None]:
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
        self.environment = None
        self.contexts.clear()
        self.connections.clear()
        self._open.close()


_innermost: Final[ContextVar[_Session | None]] = ContextVar("innermost", default=None)


class _Turn:
    """Whose turn it is in this process to use Alembic's ``op`` and ``context``."""

    thread = 0

    def __init__(self) -> None:
        self.lock = threading.Lock()


#: By process, since a child that was forked meanwhile has a turn of its own.
_turns: Final[dict[int, _Turn]] = {}
_running: Final[ContextVar[bool]] = ContextVar("running", default=False)


@contextlib.contextmanager
def _taking_turn(session: _Session) -> cabc.Generator[None]:
    """Have Alembic's ``op`` and ``context``, which are the process's, for a while."""
    turn = _turns.setdefault(os.getpid(), _Turn())
    timeout = session.settings.migration_lock_timeout

    if _running.get():
        raise FlaskAlembicError("A migration that runs cannot start another.")

    if turn.thread == threading.get_ident():
        # To wait here would stop the event loop, and with it what we wait for.
        raise FlaskAlembicError("Another task of this event loop migrates: await it.")

    if not turn.lock.acquire(timeout=-1 if timeout is None else timeout):
        raise MigrationLockTimeout(", ".join(session.databases), timeout or 0)

    turn.thread = threading.get_ident()
    token = _running.set(True)

    try:
        yield
    finally:
        _running.reset(token)
        turn.thread = 0
        turn.lock.release()


# -- Configuration ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Settings:
    """``app.config["ALEMBIC"]``, checked and cast."""

    home: str  #: The migrations folder.
    locations: list[str]  #: Where revision files are.
    folders: dict[str | None, str]  #: Where new ones go, of named branches or others.
    sections: dict[str, dict[str, str]]  #: Of ``alembic.ini``, as ConfigParser has it.
    migration_lock: bool
    migration_lock_timeout: float | None
    lock_timeout: float | None
    exclude_tables: cabc.Sequence[str]

    @property
    def template(self) -> str:
        return os.path.join(self.home, "script.py.mako")

    def is_on(self, key: str) -> bool:
        return self.sections["alembic"].get(key) == "true"


def _config_dict(app: Flask, name: str) -> dict[str, Any]:
    """One of our dicts in the application's configuration, made when missing."""
    options = app.config.setdefault(name, {})

    if isinstance(options, dict) and all(isinstance(key, str) for key in options):
        return options

    raise FlaskAlembicError(f"'{name}' must be a dict with str keys, not {options!r}.")


def _fill_in_defaults(app: Flask) -> None:
    options = _config_dict(app, "ALEMBIC")
    options.setdefault("script_location", "migrations")
    options.setdefault("version_locations", [])
    options.setdefault("path_separator", "os")
    _config_dict(app, "ALEMBIC_CONTEXT").setdefault("compare_server_default", True)


def _read_settings(app: Flask) -> _Settings:
    """Read, check and cast ``app.config["ALEMBIC"]``: the only place that does."""
    options = dict(_config_dict(app, "ALEMBIC"))
    own = {key: options.pop(key, default) for key, default in _OWN_KEYS.items()}

    for key, value in own.items():
        _check_own(key, value)

    for key in options:
        if re.search(r"^\w*_lock|^\w*_timeout|^exclude_", key):
            text = f"ALEMBIC has '{key}', but ours are {_quoted(_OWN_KEYS)}."
            raise FlaskAlembicError(text)

    root = app.root_path
    home = _find_home(root, options.get("script_location") or "migrations")
    folders: dict[str | None, str] = {None: _versions_folder(home)}
    locations = [folders[None]]

    for item in _split(options, "version_locations"):
        is_pair = isinstance(item, (list, tuple)) and len(item) == 2
        branch, path = item if is_pair else (None, item)
        locations.append(_folder(root, path, "version_locations"))
        folders.setdefault(branch, locations[-1])

    given = _split(options, "prepend_sys_path")
    paths = [_folder(root, path, "prepend_sys_path") for path in given]
    options["script_location"] = home
    options["version_locations"] = "\n".join(dict.fromkeys(locations))
    options["prepend_sys_path"] = "\n".join(paths)
    options["path_separator"] = "newline"  # which no path has in it
    return _Settings(home, locations, folders, _sections(options), **own)


def _check_own(key: str, value: Any) -> None:
    """Refuse a value of ours that cannot be used."""
    expected = "True or False"
    is_good = isinstance(value, bool)

    if "timeout" in key:
        expected = "a number of seconds, or None"
        is_number = type(value) in (int, float)
        is_good = value is None or (is_number and 0 <= value < 10**9)
    elif key == "exclude_tables":
        expected = "a list of globs"  # a string would be taken for many
        is_good = isinstance(value, (list, tuple)) and {*map(type, value)} <= {str}

    if not is_good:
        raise _bad_value(key, value, expected)


def _bad_value(key: str, value: Any, expected: str) -> FlaskAlembicError:
    return FlaskAlembicError(f"ALEMBIC['{key}'] must be {expected}, not {value!r}.")


def _split(options: dict[str, Any], key: str) -> list[Any]:
    """A list that may be written as a string, as in ``alembic.ini``."""
    name = options.get("path_separator", "os")
    separator = {"os": os.pathsep, "newline": "\n", "space": " "}.get(name, name)
    value = options.get(key)
    parts = value.split(separator) if isinstance(value, str) else _as_list(value)
    return [part for part in parts if part]


def _sections(options: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The sections of ``alembic.ini``: a dict value is one of its own."""
    sections: dict[str, dict[str, str]] = {"alembic": {}}

    for name, value in options.items():
        section = sections["alembic"]
        pairs = {name: value}

        if isinstance(value, dict):
            section = sections.setdefault(name, {})
            pairs = value

        for key, each in pairs.items():
            if each is not None:
                section[str(key)] = _cast(name, each)

    return sections


def _cast(key: str, value: Any) -> str:
    """A value as ConfigParser takes it: a string whose percent signs are doubled."""
    if isinstance(value, bool):
        return str(value).lower()

    if isinstance(value, (list, tuple)):
        return ", ".join(_cast(key, each) for each in value)

    if not isinstance(value, (str, int, os.PathLike)):
        raise _bad_value(key, value, "a str, int, bool, Path or list of them")

    # 'here' is ConfigParser's own.
    return re.sub(r"%(?:%|(?!\(here\)s))", "%%", str(value))


def _folder(root: str, value: Any, key: str) -> str:
    """The absolute path of a folder, given as a path or as ``package:folder``."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise _bad_value(key, value, "a path")

    path = os.fspath(value).replace("%%", "%")  # as ConfigParser has it
    package, colon, folder = path.partition(":")

    if colon and package.replace(".", "").isidentifier() and not os.path.isabs(path):
        try:
            spec: Any = importlib.util.find_spec(package)
            root = spec.submodule_search_locations[0]
        except (ImportError, AttributeError, TypeError) as error:
            raise _bad_value(key, value, "a path in a package that exists") from error

        path = folder

    return os.path.abspath(os.path.join(root, path))


def _find_home(root: str, location: Any) -> str:
    """The migrations folder, perhaps Flask-Migrate's beside a package."""
    home = _folder(root, location, "script_location")
    beside = os.path.join(os.path.dirname(root), "migrations")
    # That of a module's neighbour would be somebody else's history.
    is_package = os.path.isfile(os.path.join(root, "__init__.py"))

    if location != "migrations" or os.path.isdir(home) or not is_package:
        return home

    return beside if _versions_folder(beside) != beside else home


def _versions_folder(home: str) -> str:
    """The folder of revisions: ``versions``, as in Alembic's layout, or ``home``."""
    _, folders, files = next(os.walk(home), ("", [], []))
    modules = {name for name in files if name.endswith(".py")} - {"__init__.py"}
    is_nested = "versions" in folders and (not modules or "env.py" in modules)
    return os.path.join(home, "versions") if is_nested else home


# -- Engines and metadata --------------------------------------------------------------


class _Database(NamedTuple):
    """One database: the sync side of its engine, its metadata as given."""

    name: str
    engine: sa.Engine
    metadata: MetadataOption
    options: dict[str, Any]  #: Of ``EnvironmentContext.configure``, without our hooks.

    @property
    def is_async(self) -> bool:
        return self.engine.dialect.is_async

    @property
    def is_sqlite(self) -> bool:
        return self.engine.name == "sqlite"

    @property
    def place(self) -> tuple[Any, ...]:
        """Where its version table is, as far as the URL tells."""
        url = self.engine.url
        # In memory, or with a 'creator', it tells nothing.
        is_told = url.database not in (None, ":memory:")
        schema = self.options["version_table_schema"]
        table = self.options["version_table"]
        return (str(url) if is_told else id(self.engine), schema, table)


def _find_databases(extension: Alembic) -> dict[str, _Database]:
    """The databases to migrate: those that the metadata name. Arguments win."""
    metadatas = _find_metadatas(extension)
    engines = _find_engines(extension)

    if not engines:
        raise FlaskAlembicError("There are no engines configured: pass 'engines'.")

    if missing := _quoted(metadatas.keys() - engines.keys()):
        raise FlaskAlembicError(f"Missing engine config for {missing}: pass 'engines'.")

    databases: dict[str, _Database] = {}
    places: dict[Any, str] = {}

    for name, metadata in metadatas.items():
        engine = getattr(engines[name], "sync_engine", engines[name])
        _check_parts(name, engine, metadata)
        database = _Database(name, engine, metadata, _user_options(name, engine))
        databases[name] = database
        other = places.setdefault(database.place, name)

        if other != name:
            both = _quoted([other, name])
            raise FlaskAlembicError(f"{both} share a 'version_table': rename it.")

    batches = any(each.is_sqlite for each in databases.values())

    for database in databases.values():
        # SQLite can alter little in place; one file holds the revisions of all.
        database.options.setdefault("render_as_batch", batches)

    return databases


def _find_metadatas(extension: Alembic) -> dict[str, Any]:
    if extension.metadatas:
        return extension.metadatas

    db = current_app.extensions.get("sqlalchemy")

    if not hasattr(db, "metadata"):
        raise FlaskAlembicError(
            "No metadata found: pass 'metadatas' when setting up Alembic or, with"
            " Flask-SQLAlchemy, call 'db.init_app(app)'."
        )

    if any(db.metadatas):  # of binds, which have to be named
        _check_template(extension._get_cache().settings.template, ["default"], True)

    return {"default": db.metadata}


def _find_engines(extension: Alembic) -> dict[str, Any]:
    db = current_app.extensions.get("sqlalchemy")
    # A sync engine goes before an async one; Flask-SQLAlchemy may call it None.
    found = dict(getattr(db, "async_engines", None) or {})
    found.update(getattr(db, "engines", None) or {})
    engines = {name or "default": engine for name, engine in found.items()}
    engines.update(extension.engines)
    return engines


def _check_parts(name: str, engine: Any, metadata: Any) -> None:
    kinds = {isinstance(each, sa.MetaData) for each in _as_list(metadata)}

    if kinds != {True} or not isinstance(engine, sa.Engine):
        raise FlaskAlembicError(
            f"Database '{name}' needs an engine and a MetaData (or a list of them),"
            f" not {metadata!r}."
        )


def _user_options(name: str, engine: sa.Engine) -> dict[str, Any]:
    """The ``configure`` options of one database: common, ours for its kind, its own."""
    options: dict[str, Any] = {"version_table": "alembic_version"}

    if engine.name == "sqlite":
        # It rolls DDL back when asked to. A second connection sees only commits.
        options.update(transactional_ddl=True, transaction_per_migration=True)

    options.update(_config_dict(current_app, "ALEMBIC_CONTEXT"))

    if engine.name in ("mysql", "mariadb"):
        # Alembic's comparison sees changes in most of their columns.
        options["compare_server_default"] = False

    own = options.pop(name, None)

    if isinstance(own, dict):
        options.update(own)

    # An empty schema, as from an environment variable, is none.
    options["version_table_schema"] = options.get("version_table_schema") or None
    return options


def _primary(by_name: dict[str, _R]) -> _R:
    """That of the database which is meant where one answer is asked for."""
    if len(by_name) > 1 and "default" not in by_name:
        raise FlaskAlembicError(f"No 'default': name one of {_quoted(by_name)}.")

    return by_name.get("default", next(iter(by_name.values())))


# -- Revisions -------------------------------------------------------------------------
# What is asked of the history without a database.


class _Target(NamedTuple):
    """What a method is to reach, parsed once."""

    names: _Ids  #: As Alembic takes them.
    argument: Any  #: The only name alone, as most of Alembic's functions want it.
    counts: bool  #: Whether it is so many revisions from another, or from the database.
    sign: str  #: Of a count from where the database stands; else empty.

    def __str__(self) -> str:
        return " ".join(self.names)


def _parse_target(script: ScriptDirectory, target: Any, sign: str = "") -> _Target:
    """Parse a target; with a sign, ints and digits are counts in that direction."""
    names = []

    for each in _as_list(target) or [None]:
        name = getattr(each, "revision", each)

        if sign and type(name) is int:
            name = f"{sign}{abs(name)}"

        if not isinstance(name, str) or not name:
            raise _command_error(f"{target!r} is no revision.")

        if sign and name.isdecimal():
            name = _count_or_id(script, name, sign)

        names.append(name)

    argument = name if len(names) == 1 else tuple(names)
    counts = bool(re.search(r"[+-]\d+$", name))
    return _Target(tuple(names), argument, counts, "".join({name[0]} & {"+", "-"}))


def _count_or_id(script: ScriptDirectory, digits: str, sign: str) -> str:
    """Digits are the id that they spell, else a count, if that can be told."""
    longer = [id_ for id_ in _revisions_by_id(script) if id_.startswith(digits)]
    count = f"{sign}{int(digits)}"

    if not longer:
        return count

    # Nobody counts to a thousand.
    if digits in longer or len(digits) > 3:
        return digits

    raise _command_error(
        f"'{digits}' may be a count or the beginning of an id: write '{count}', or one"
        f" of {_quoted(longer)}."
    )


def _load_history(config: Config) -> _Loaded:
    """Load the revision files, and refuse those that form no history."""
    from alembic.script import ScriptDirectory
    from alembic.script.revision import RevisionMap

    home = config.get_main_option("script_location") or ""

    if ":" not in home and not os.path.isdir(home):
        raise FlaskAlembicError(f"There is no folder '{home}': run {_typed('mkdir')}.")

    script: Any = ScriptDirectory.from_config(config)
    # Alembic puts 'prepend_sys_path' there each time.
    sys.path[:] = dict.fromkeys(sys.path)
    # It tells on stdout about each file that it writes; only commands print.
    script.messaging_opts = {"quiet": True}
    signature = _signature(script)
    scripts = _load_files(script)
    _check_history(scripts)
    script.revision_map = RevisionMap(lambda: scripts)

    try:
        script.get_heads()
    except Exception as error:
        raise FlaskAlembicError(f"The files form no history: {error}") from error

    return _Loaded(config, signature, script)


def _signature(script: ScriptDirectory) -> list[Any]:
    """What changes when a revision file is added, removed or changed."""
    found: list[Any] = []

    for path in _files_of(script):
        with contextlib.suppress(OSError):  # gone, or a link to nowhere
            info = path.stat()
            found.append((path, info.st_mtime_ns, info.st_size))

    return found


def _check_history(scripts: list[Script]) -> None:
    """Name the files where two have one id, or what one follows is in none."""
    paths: dict[str, str] = {}

    for script in scripts:
        id_ = script.revision
        other = paths.setdefault(id_, script.path)
        paths.update(dict.fromkeys(script.branch_labels, script.path))

        if other != script.path:
            raise FlaskAlembicError(
                f"Revision '{id_}' is in two files: '{other}' and '{script.path}'."
            )

    for script in scripts:
        if missing := _parents(script) - paths.keys():
            raise FlaskAlembicError(
                f"'{script.path}' follows {_quoted(missing)}, which no file has."
            )


def _parents(script: Script) -> set[str]:
    """What a revision follows or depends on."""
    return {*_as_list(script.down_revision), *_as_list(script.dependencies)}


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
        found = script.get_revisions(parsed.names)
        return list({each.revision: each for each in found}.values())


def _below(script: ScriptDirectory, ids: cabc.Iterable[str]) -> set[str]:
    """Revisions and all that they follow or depend on."""
    return {s.revision for id_ in ids for s in script.walk_revisions("base", id_)}


def _tops(script: ScriptDirectory, applied: set[str]) -> set[str]:
    """What the version table holds when these revisions, and no others, have run."""
    covered: set[str] = set()

    for each in script.get_revisions(tuple(applied)):
        below = script.get_revisions(tuple(_parents(each)))
        covered.update(parent.revision for parent in below)

    return applied - covered


@contextlib.contextmanager
def _explained(
    script: ScriptDirectory, target: _Target, rows: cabc.Sequence[str] = ()
) -> cabc.Generator[None]:
    """Repeat the target in what Alembic says of it, or stumbles over."""
    from alembic.util import CommandError

    try:
        for name in target.names:
            branch, at, _ = name.partition("@")

            if at:  # Alembic takes 'nope@base' and 'nope@-1' for 'base'
                script.get_revision(branch or "@")

        yield
    except Exception as error:
        reason = f"it is no revision; {_typed('log')} shows them"

        if heads := getattr(error.__cause__, "heads", ()):
            raise _several_heads(heads) from error

        if target.counts:
            reason = _why_not_so_far(script, target, rows)
        elif isinstance(error, CommandError):
            reason = f"{str(error).rstrip('.')}; {_typed('log')} shows what there is"
        elif isinstance(error, AttributeError) and inspect.ismodule(error.obj):
            reason = f"'{error.obj.__file__}' has no function '{error.name}'"

        raise _command_error(f"'{target}' cannot be used: {reason}.") from error


def _why_not_so_far(
    script: ScriptDirectory, target: _Target, rows: cabc.Sequence[str]
) -> str:
    """Why a count leads nowhere: several ways, or not as many revisions."""
    names = []

    if target.sign:
        names = [*rows] or script.get_bases()

    while len(names) == 1:
        revision = script.get_revision(names[0])
        names = _as_list(revision.down_revision)

        if target.sign == "+":
            names = _as_list(revision.nextrev)

    if names:
        return f"there are several ways; name one of {_quoted(names)}"

    return "there are not that many revisions"


def _several_heads(heads: cabc.Iterable[str]) -> Exception:
    merge = _typed(f'merge -m "merge heads" {" ".join(sorted(heads))}')
    return _command_error(
        "There are several heads. Name one, take 'heads' for all, or merge them:"
        f" {merge[1:-1]}"
    )


def _unknown_ids(script: ScriptDirectory, rows: cabc.Iterable[Any]) -> list[str]:
    """Ids in a version table that no revision file has; NULL is such a one."""
    known = _revisions_by_id(script)
    return [str(row) for row in rows if row not in known]


def _unknown_error(session: _Session, name: str, unknown: cabc.Iterable[str]) -> Any:
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
    name = current_app.extensions["alembic"]._get_cache().command_name or "db"
    return f"'flask {name} {words}'"


# -- Environment -----------------------------------------------------------------------
# The job, the connections, and the run: one attempt on one database, for each of them.
# Only here are Alembic's private names touched.


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a method asks for: an upgrade, a downgrade, a stamp, or a caller's own."""

    kind: str = "own"
    target: RevisionTarget = "heads"
    start: str = "base"
    purge: bool = False
    allow_newer: bool = False
    progress: Progress | None = None


def _job_steps(session: _Session, heads: Any, context: Any) -> list[Any]:
    """The steps of a session's job from the ids in a version table."""
    # Read when the lock is held: the files may have changed while we waited.
    script = session.extension.script_directory
    context.script = script
    job = session.job
    target = session.target
    rows = tuple(heads)

    if unknown := _unknown_ids(script, rows):
        name = context.opts.get("database", "default")  # a subclass may not have said

        if not job.allow_newer:
            raise _unknown_error(session, name, unknown)

        ids = _quoted(unknown)
        text = "Database '%s' is left alone: it is at %s, which no revision file has."
        _logger.info(text, name, ids)
        return []

    if job.kind == "stamp":
        return _stamp_steps(script, {*rows}, target)

    if target.sign and len({*rows}) > 1:
        raise _ambiguous(script, rows, target)

    with _explained(script, target, rows):
        # Alembic's commands make theirs so; no public function does.
        make = getattr(script, f"_{job.kind}_revs")
        return list(make(target.argument, rows))


def _ambiguous(script: ScriptDirectory, rows: _Ids, target: _Target) -> Exception:
    """Refuse to count from several branches: which one is not said."""
    found = _scripts(script, rows)
    names = {min(each.branch_labels, default=each.revision) for each in found}

    if len(names) < len(found):
        names = {*rows}

    choice = _quoted(f"{name}@{target}" for name in names)
    return _command_error(f"'{target}' is ambiguous: name one of {choice}.")


def _stamp_steps(script: Any, rows: set[str], target: _Target) -> list[Any]:
    """Steps to exactly the rows that are asked for; Alembic's own lose a branch."""
    from alembic.runtime.migration import StampStep

    if target.counts:
        raise _command_error(f"'{target}' is relative: name a revision.")

    history = script.revision_map
    applied = _below(script, rows)
    named: set[str] = set()

    for name in target.names:
        found = {each.revision for each in _scripts(script, name)}
        named |= found

        if not found:  # 'base' or 'branch@base'
            applied.difference_update(history.filter_for_lineage(applied, name))

    above = {*named}

    for id_, each in _revisions_by_id(script).items():
        if above.intersection(_as_list(each.down_revision)):
            above.add(id_)

    wanted = _tops(script, applied - above | _below(script, named))
    # A script that removes the last row first would make the table again.
    new = [StampStep(None, id_, True, True, history) for id_ in sorted(wanted - rows)]
    old = [StampStep(id_, None, False, True, history) for id_ in sorted(rows - wanted)]
    return new + old


def _files_of(script: Any) -> list[Any]:
    """The paths that Alembic would load from; its public attribute has none of them."""
    from alembic.script import Script

    loader: Any = Script
    locations = [each for each in script._version_locations if each.exists()]
    return [path for each in locations for path in loader._list_py_dir(script, each)]


def _load_files(script: Any) -> list[Script]:
    """Load the files one by one: Alembic, which loads all, names none that fails."""
    from alembic.script import Script

    loader: Any = Script
    found = []

    for path in dict.fromkeys(each.resolve() for each in _files_of(script)):
        try:
            found.append(loader._from_path(script, path))
        except (Exception, SystemExit) as error:
            cause = f"{type(error).__name__}: {error}"
            raise FlaskAlembicError(f"'{path}' cannot be loaded: {cause}") from error

    return [each for each in found if each is not None]


@contextlib.contextmanager
def _connect(database: _Database, has_own_pool: bool) -> cabc.Generator[sa.Connection]:
    """A connection, given back to its pool in the end.

    One that migrates a server, or that is bound to an event loop, must never reach the
    application's pool: it has a pool of its own.
    """
    engine: Any = database.engine
    pool = engine.pool
    options = engine.get_execution_options()

    # SQLAlchemy 2.0 listens to no connection of an engine with options.
    while proxied := getattr(engine, "_proxied", None):
        engine = proxied

    with contextlib.ExitStack() as stack:
        if isinstance(pool, sa.StaticPool):
            # Giving it back rolls back what the application has open: look first.
            _refuse_transaction(database.name, pool.connection.driver_connection)

        try:
            if has_own_pool and not isinstance(pool, sa.StaticPool):
                pool = pool.recreate()
                stack.callback(pool.dispose)
                connection = sa.Connection(engine, pool.connect())
            else:
                connection = engine.connect()
        except Exception as error:
            # Without user and password, and the query, which may hold one too.
            place = ", ".join(str(x) for x in (engine.url[0], *engine.url[3:6]) if x)
            cause = _one_line(getattr(error, "orig", None) or error)
            error.add_note(f"{_NO_CONNECTION} '{database.name}' ({place}): {cause}")
            raise

        stack.callback(connection.close)

        if isinstance(pool, sa.SingletonThreadPool):
            driver = connection.connection.driver_connection
            _refuse_transaction(database.name, driver)

        yield connection.execution_options(**options)


def _is_in_transaction(driver_connection: Any) -> bool:
    """Whether the driver has a transaction open; true where it does not tell."""
    if hasattr(driver_connection, "in_transaction"):  # sqlite3, aiosqlite
        return bool(driver_connection.in_transaction)

    if hasattr(driver_connection, "is_in_transaction"):  # asyncpg
        return bool(driver_connection.is_in_transaction())

    info = getattr(driver_connection, "info", None)  # psycopg, psycopg2
    return bool(getattr(info, "transaction_status", True))


def _refuse_transaction(name: str, driver_connection: Any) -> None:
    # With Python 3.12's 'autocommit=False', sqlite3 has one open at all times.
    is_always_open = getattr(driver_connection, "autocommit", True) is False

    if not is_always_open and _is_in_transaction(driver_connection):
        raise FlaskAlembicError(
            f"The application has a transaction open on database '{name}': end it."
        )


@contextlib.contextmanager
def _reading(connection: Any) -> cabc.Generator[None]:
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

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()  # here, since not all that a revision imports bears a thread

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_context().run, run).result()


def _rows_of(database: _Database, connection: sa.Connection) -> set[Any]:
    """The ids in a version table, by one query that needs no Alembic."""
    options = database.options
    table = sa.table(
        options["version_table"],
        sa.column("version_num", sa.String()),
        schema=options["version_table_schema"],
    )
    return {*connection.scalars(sa.select(table))}


def _heads_of(session: _Session, name: str) -> _Ids:
    context: Any = session.extension.migration_contexts[name]

    with _reading(context.connection):
        return context.get_current_heads()


def _current(session: _Session) -> tuple[Script, ...]:
    found: dict[Script, None] = {}

    for name, state in _status(session).items():
        found.update(dict.fromkeys(state.current))

        if state.unknown:
            raise _unknown_error(session, name, state.unknown)

    return tuple(found)


def _status(session: _Session) -> dict[str, DatabaseStatus]:
    script: Any = session.extension.script_directory
    heads = script.get_revisions("heads")
    known = _revisions_by_id(script)
    result = {}

    for name in session.databases:
        rows = _heads_of(session, name)
        unknown = tuple(_unknown_ids(script, rows))
        current = tuple(known[id_] for id_ in known if id_ in rows)
        steps = [] if unknown else script._upgrade_revs("heads", rows)
        pending = tuple(step.revision for step in steps)
        result[name] = DatabaseStatus(current, heads, pending, unknown)

    return result


def _needs_upgrade(session: _Session) -> bool:
    if _is_current(session):
        return False

    return bool(_databases_to_run(session, functools.partial(_job_steps, session)))


def _migrate(session: _Session) -> list[Script]:
    if not _is_current(session):
        session.extension.run_migrations(functools.partial(_job_steps, session))

    return list(session.ran.values())


def _databases_to_run(session: _Session, fn: StepFunction) -> list[str]:
    """The databases that have something to do; all are asked, nothing is written."""
    if session.job.purge:
        return list(session.databases)

    contexts = session.extension.migration_contexts
    steps = {name: [*fn(_heads_of(session, name), contexts[name])] for name in contexts}
    return [name for name in steps if steps[name]]


class _Run:
    """One attempt on one database: its environment, its guard, its steps.

    Without a connection, it writes SQL.
    """

    def __init__(
        self,
        session: _Session,
        name: str,
        fn: StepFunction,
        connection: Any,
        options: dict[str, Any],
        **given: Any,
    ) -> None:
        from alembic.runtime.environment import EnvironmentContext

        self.session = session
        self.name = name
        self.fn = fn
        self.connection = connection
        self.step: RevisionStep | None = None  #: That is being run, or has failed.
        self.heads: set[str] = set()  #: The version table, as far as the run has come.
        self.watch = _Watch(connection)
        self.guard = _make_guard(session.databases[name], connection, session.settings)
        options = {**_context_options(session, name), **options}

        if session.job.kind == "stamp":
            options["transaction_per_migration"] = False

        script = session.extension.script_directory
        given.update(fn=self.steps, tag=session.tag, purge=session.job.purge)
        self.environment = EnvironmentContext(session.config, script, **given)
        self.environment.configure(connection, **options)
        self.context: Any = self.environment.get_context()
        self.context.on_version_apply_callbacks += (self.applied,)

    def applied(self, *, heads: cabc.Iterable[str], **_: Any) -> None:
        self.heads = {*heads}

    def steps(self, heads: Any, context: MigrationContext) -> cabc.Iterator[Any]:
        """The steps; Alembic takes each when the one before is in the version table."""
        from alembic.runtime.migration import RevisionStep

        self.heads = {*heads}
        steps: list[Any] = list(self.fn(heads, context))
        progress = self.session.job.progress

        for place, step in enumerate(steps, 1):
            if not isinstance(step, RevisionStep):  # but a stamp
                yield step
                continue

            began = time.monotonic()
            call = functools.partial(self.call, step, step.migration_fn)
            # Offline, Alembic reads its name.
            step.migration_fn = functools.update_wrapper(call, step.migration_fn)
            yield step
            self.record()
            script: Any = step.revision
            self.session.ran[script.revision] = script

            if progress is not None:
                took = time.monotonic() - began
                progress(self.name, script, place, len(steps), took)

    def call(self, step: Any, function: Any, /, **kwargs: Any) -> None:
        """Call the function of a revision, unless it is not for this database."""
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"{_title(step)} has an async function, which cannot run.")

        databases = self.session.all_databases
        takes_name = "engine_name" in inspect.signature(function).parameters
        # One without the argument is from before there was a second database.
        found = {"default"} if len(databases) > 1 else {self.name}

        if takes_name:
            prefix = "upgrade_" if step.is_upgrade else "downgrade_"
            names = [x for x in vars(step.revision.module) if x.startswith(prefix)]
            found = {x.removeprefix(prefix) for x in names} or {self.name}
            is_unnamed = self.name == "default" and "" in found  # by Flask-Migrate
            kwargs["engine_name"] = "" if is_unnamed else self.name

        if self.name in found or kwargs.get("engine_name") == "":
            self.execute(step, functools.partial(function, **kwargs))
        elif not found - {""} <= databases.keys():  # else this one came later
            raise _command_error(
                f"{_title(step)} has no function for database '{self.name}'."
                " Was it renamed?"
            )

    def execute(self, step: RevisionStep, work: cabc.Callable[[], object]) -> None:
        """Do what a revision does, and see what becomes of the transaction."""
        if self.connection is None:
            return _write_offline(step, work)

        self.guard.check(self.heads)
        self.step = step
        self.watch = _Watch(self.connection)

        with self.watch.watching():
            work()

        # What Alembic opened: for the run, for the step, after an autocommit_block().
        transaction = self.context._transaction  # noqa: SLF001  # no public name has it

        if transaction is not None and not transaction.is_active:
            raise FlaskAlembicError(
                f"{_title(step)} ended the migration's own transaction, by a 'commit()'"
                " or 'rollback()': use 'op.get_context().autocommit_block()' instead."
            )

        self.guard.check(self.heads)

    def record(self) -> None:
        """Commit the row of a revision that has committed its work: both or neither."""
        if self.watch.committed and self.connection.in_transaction():
            with self.context.autocommit_block():
                pass

        self.watch = _Watch(self.connection)
        self.step = None

    def outcome(self) -> str:
        """Where the database stands after a failure, and what to do about it."""
        where = "is where it stands, which cannot be read now"
        rows = self.heads
        keeps_ddl = not (self.guard.rolls_back or self.context.impl.transactional_ddl)

        with contextlib.suppress(Exception):
            rows = {*_heads_of(self.session, self.name)}
            where = f"is at {_quoted(rows) or 'base'}"

        line = f"Database '{self.name}' {where}: what was not committed is rolled back."

        # Else what it did was rolled back, or is recorded.
        if self.step is not None and rows == self.heads:
            if self.watch.committed:
                line += self.advice(self.step, "committed stays")
            elif keeps_ddl:
                line += self.advice(
                    self.step, "done may stay (each DDL statement commits)"
                )

        return line

    def advice(self, step: Any, what: str) -> str:
        id_ = step.revision.revision
        names = [id_]

        if not step.is_upgrade:
            names = _as_list(step.revision.down_revision) or [f"{id_}@base"]
            names.extend(self.heads - {id_})

        stamp = _typed(f"stamp{self.session.only(self.name)} {' '.join(names)}")
        return (
            f" What '{id_}' has {what}: undo it by hand and run the command again, or"
            f" finish it and run {stamp}."
        )


def _title(step: Any) -> str:
    return f"Revision '{step.revision.revision}' ('{step.revision.path}')"


class _Watch:
    """Sees a revision commit the transaction that it runs in."""

    committed = False

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    @contextlib.contextmanager
    def watching(self) -> cabc.Generator[None]:
        self.was_open = self.is_open()
        listeners = {
            "before_cursor_execute": self.on_statement,
            "commit": self.on_commit,
        }

        with _listening(self.connection, **listeners):
            try:
                yield
            except exc.DBAPIError:
                # A statement that fails, as on a full disk, may roll back by itself.
                self.was_open = False
                raise
            finally:
                self.look()

    def on_commit(self, connection: Any) -> None:
        """An ``autocommit_block()`` begins, or the revision calls ``commit()``."""
        self.committed = True

    def on_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> tuple[str, Any]:
        self.look()

        if statement.lstrip()[:8].upper() == "ROLLBACK":
            self.was_open = False

        return statement, parameters

    def look(self) -> None:
        """See what only the driver knows, as after ``op.execute("COMMIT")``."""
        is_open = self.is_open()
        self.committed |= self.was_open and not is_open
        self.was_open = is_open

    def is_open(self) -> bool:
        connection = self.connection

        if connection.closed or connection.invalidated:
            return False

        return _is_in_transaction(connection.connection.driver_connection)


def _run_online(session: _Session, fn: StepFunction, kwargs: dict[str, Any]) -> None:
    """Run steps on a session's databases: on all or none, as far as they allow."""
    is_own = session.job.kind == "own"
    session.ran.clear()

    while True:
        # What a caller has open is not ours to commit; and Alembic would not commit
        # what it runs within a transaction of another.
        session.roll_back()
        names = list(session.databases)

        # A SQLite file that is locked is waited for by its guard.
        with contextlib.suppress(exc.OperationalError):
            if not is_own:
                names = _databases_to_run(session, fn)

        try:
            return _attempt(session, names, fn, kwargs)
        except _OvertakenError:
            if is_own or session.target.counts:
                raise


def _attempt(
    session: _Session, names: list[str], fn: StepFunction, kwargs: dict[str, Any]
) -> None:
    """Run steps once, which another process may make vain."""
    if not names:
        return

    runs: dict[str, _Run] = {}

    try:
        with _taking_turn(session), contextlib.ExitStack() as stack:
            # What the extension works on when a revision calls it.
            inner = _Session(session.extension, session)
            stack.enter_context(inner.entered())

            # All locks first, in the same order in every process.
            for name in sorted(names):
                if not session.databases[name].is_sqlite:
                    inner.open(name, has_own_pool=True)

                run = _Run(session, name, fn, inner.connect(name), {})
                inner.contexts[name] = run.context
                runs[name] = run
                stack.enter_context(run.guard.held())

            for run in runs.values():
                stack.enter_context(run.environment.begin_transaction())

            for name in names:
                with runs[name].environment as environment:
                    environment.run_migrations(**kwargs)
    except BaseException as error:
        failed = [run.step for run in runs.values() if run.step is not None]

        if session.ran or failed:
            lines = [f"{_title(step)} failed." for step in failed]
            lines.extend(run.outcome() for run in runs.values())
            error.add_note("\n".join(lines))

        raise


def _run_offline(session: _Session) -> dict[str, str]:
    """Write the steps as SQL, from where the databases stand or from a given start."""
    script = session.extension.script_directory
    start = session.job.start
    is_live = start == "current"
    rows = () if is_live else tuple(x.revision for x in _scripts(script, start))
    result = {}

    for name in session.databases:
        if is_live:
            rows = _heads_of(session, name)

            if unknown := _unknown_ids(script, rows):
                raise _unknown_error(session, name, unknown)

        output = io.StringIO()
        run = _make_offline_run(session, name, rows, output)

        if is_live and _has_version_table(session, name):
            # Alembic takes an empty version table for none, and would make it.
            run.context._version.create = lambda connection: None  # noqa: SLF001

        with _taking_turn(session), run.environment.begin_transaction():
            with run.environment as environment:
                environment.run_migrations()

        result[name] = output.getvalue()

    if start not in ("base", "current") and session.job.kind == "upgrade":
        if not session.ran:
            raise _command_error(f"'{start}:{session.target}' leads nowhere.")

    return result


def _make_offline_run(
    session: _Session, name: str, rows: _Ids, output: io.StringIO
) -> _Run:
    database = session.databases[name]
    # Other parameter styles would double the percent signs in the script.
    style = {"paramstyle": "named", **database.options.get("dialect_opts", {})}
    options = {"url": database.engine.url, "dialect_opts": style, "literal_binds": True}
    given = {"as_sql": True, "starting_rev": rows, "output_buffer": output}
    steps = functools.partial(_job_steps, session)
    run = _Run(session, name, steps, None, options, **given)

    if database.engine.name == "postgresql":
        # SQLAlchemy 2.0 doubles backslashes until it has seen a server's setting.
        run.context.dialect._backslash_escapes = False  # noqa: SLF001

    return run


def _write_offline(step: RevisionStep, work: cabc.Callable[[], object]) -> None:
    from alembic.util import CommandError

    reason = f"{_title(step)} cannot be written as SQL, without a connection"

    try:
        work()
    except CommandError as error:
        raise _command_error(f"{reason}: {error}") from error
    except Exception as error:
        error.add_note(f"{reason}.")
        raise


def _has_version_table(session: _Session, name: str) -> bool:
    options = session.databases[name].options
    connection = session.connect(name)

    with _reading(connection):
        return sa.inspect(connection).has_table(
            options["version_table"], schema=options["version_table_schema"]
        )


# -- Guards ----------------------------------------------------------------------------
# Around a run on a database: its lock, its limits, SQLite's transaction.


@dataclasses.dataclass
class _Guard:
    """Of servers without a lock of ours, and where SQLite is to work as by Alembic."""

    database: _Database
    connection: Any
    settings: _Settings
    rolls_back = False  #: Whether the server rolls DDL back, whatever Alembic knows.

    @contextlib.contextmanager
    def held(self) -> cabc.Generator[None]:
        """Hold the lock for a run, and keep the limits."""
        yield

    def check(self, heads: set[str]) -> None:
        """See, before and after a revision, that the lock is ours."""


class _ServerGuard(_Guard):
    """Takes a lock of the session, which a commit in between does not give up."""

    take: str
    release: str
    limit: str

    @contextlib.contextmanager
    def held(self) -> cabc.Generator[None]:
        connection = self.connection
        # An engine in AUTOCOMMIT has no transaction that could be rolled back.
        connection.execution_options(isolation_level=connection.default_isolation_level)

        with _listening(connection, begin=self.on_begin):
            if self.settings.migration_lock:
                timeout = self.settings.migration_lock_timeout
                _wait(self.database.name, timeout, lambda: self.ask(self.take))

            try:
                yield
            finally:
                # What was lost has released the lock itself.
                with contextlib.suppress(exc.SQLAlchemyError):
                    connection.rollback()
                    self.give_back()

    def give_back(self) -> None:
        if self.settings.migration_lock and not self.ask(self.release):
            text = "Lock of '%s' lost: 'migration_lock' must be off for a pooler."
            _logger.warning(text, self.database.name)

    def ask(self, function: str) -> bool:
        options = self.database.options
        default = self.connection.dialect.default_schema_name
        schema = options["version_table_schema"] or default or ""
        key = {"key": f"flask_alembic:{schema}.{options['version_table']}"}

        # Ended at once: a concurrent index build waits for all that are open.
        with _reading(self.connection):
            return bool(self.connection.scalar(sa.text(f"SELECT {function}"), key))

    def on_begin(self, connection: sa.Connection) -> None:
        seconds = self.settings.lock_timeout

        if seconds is not None:  # to the server, 0 would be no limit
            connection.exec_driver_sql(self.limit.format(max(seconds, 0.001)))


class _PostgresqlGuard(_ServerGuard):
    rolls_back = True
    take = "pg_try_advisory_lock(hashtextextended(:key, 0))"
    release = "pg_advisory_unlock(hashtextextended(:key, 0))"
    # Of the transaction: a pooler would pass a session's on.
    limit = "SET LOCAL lock_timeout = '{}s'"


class _MysqlGuard(_ServerGuard):
    # The name is the server's, so it has the database in it, as the schema.
    take = "GET_LOCK(SHA1(:key), 0)"
    release = "RELEASE_LOCK(SHA1(:key))"
    limit = "SET lock_wait_timeout = CEILING({})"


@dataclasses.dataclass
class _SqliteGuard(_Guard):
    """Makes SQLite's transaction cover DDL; its ``BEGIN IMMEDIATE`` is the lock."""

    rolls_back = True

    def __post_init__(self) -> None:
        self._driver: Any = self.connection.connection.dbapi_connection
        self._cursor = self._driver.cursor()
        self._enforced = int(self._pragma("foreign_keys"))
        self._orphans: dict[str, _Orphans] | None = None  # when the transaction began
        self._was_free = False  # others could have the lock since the heads were read

    @contextlib.contextmanager
    def held(self) -> cabc.Generator[None]:
        connection = self.connection
        driver = self._driver
        name = self.database.name
        _refuse_transaction(name, connection.connection.driver_connection)
        level = driver.isolation_level
        mode = getattr(driver, "autocommit", -1)

        if mode != -1:  # Python 3.12's own control: it knows no BEGIN IMMEDIATE
            driver.autocommit = -1
            driver.rollback()

        if _is_autocommit(connection):
            connection.execution_options(isolation_level="SERIALIZABLE")

        # A batch operation drops the original table, which would delete its children.
        self._pragma("foreign_keys = 0")
        listening = _listening(
            connection,
            begin=self.on_begin,
            commit=self.on_commit,
            before_cursor_execute=self.before_statement,
            set_connection_execution_options=self.on_options,
        )

        try:
            with listening:
                yield
        finally:
            if not connection.closed and not connection.invalidated:  # as by Ctrl-C
                connection.rollback()
                driver.rollback()
                self._pragma(f"foreign_keys = {self._enforced}")
                driver.isolation_level = level
                self._cursor.close()

                if mode != -1:
                    driver.autocommit = mode

    def check(self, heads: set[str]) -> None:
        """Take the lock again where a revision gave it up; see who had it since."""
        self.on_begin(self.connection)
        was_free = self._was_free
        self._was_free = False

        if was_free and heads != _rows_of(self.database, self.connection):
            name = self.database.name
            raise _OvertakenError(f"Another process migrated '{name}': run again.")

    def on_begin(self, connection: Any) -> None:
        """Take the lock, where it is not ours yet."""
        driver = self.connection.connection.driver_connection

        if _is_autocommit(self.connection) or _is_in_transaction(driver):
            return

        self._driver.isolation_level = None  # an autocommit_block() gave it back
        patience = self._pragma("busy_timeout")
        self._pragma("busy_timeout = 0")

        try:
            timeout = self.settings.migration_lock_timeout
            _wait(self.database.name, timeout, self._attempt)
        finally:
            self._pragma(f"busy_timeout = {patience}")

        self._was_free = True

        if self._enforced and self._orphans is None:
            self._orphans = self._find_orphans()

    def _attempt(self) -> bool:
        statement = "BEGIN IMMEDIATE" if self.settings.migration_lock else "BEGIN"

        try:
            self._cursor.execute(statement)
        except Exception as error:
            if "locked" not in str(error):
                raise exc.OperationalError(statement, None, error) from error

            return False

        return True

    def on_commit(self, connection: Any) -> None:
        """Refuse a transaction that adds rows which refer to nothing."""
        before = self._orphans
        self._orphans = None

        if before is None:
            return

        # A table that is renamed keeps its root page.
        by_page = {each.page: each.count for each in before.values()}
        added = []

        for name, now in self._find_orphans().items():
            former = before[name].count if name in before else by_page.get(now.page, 0)

            if now.count > former:
                added.append(name)

        if added:
            text = f"Refused to orphan rows of {_quoted(added)}"
            raise FlaskAlembicError(f"{text} in '{self.database.name}'.")

    def before_statement(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> tuple[str, Any]:
        # SQLAlchemy's recipe for SQLite has a listener of the engine emit BEGIN.
        if statement.lstrip()[:5].upper() == "BEGIN":
            statement = "SELECT 1"

        return statement, parameters

    def on_options(self, connection: Any, options: dict[str, Any]) -> None:
        """Enforce foreign keys as the application does in an ``autocommit_block()``."""
        if "isolation_level" in options:
            is_block = options["isolation_level"] == "AUTOCOMMIT"
            self._pragma(f"foreign_keys = {self._enforced if is_block else 0}")

    def _pragma(self, text: str) -> Any:
        self._cursor.execute(f"PRAGMA {text}")
        return (self._cursor.fetchone() or [None])[0]

    def _find_orphans(self) -> dict[str, _Orphans]:
        cursor = self._cursor
        found = {}
        cursor.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'table'")

        for name, page in cursor.fetchall():
            # It fails where a key of the table refers to columns that are not unique.
            with contextlib.suppress(self.connection.dialect.dbapi.OperationalError):
                cursor.execute(
                    "SELECT count(*) FROM pragma_foreign_key_check(?)", [name]
                )
                found[name] = _Orphans(page, cursor.fetchone()[0])

        return found


class _Orphans(NamedTuple):
    """How many rows of a table refer to nothing, and where the table begins."""

    page: int
    count: int


_GUARDS: Final[dict[str, type[_Guard]]] = {
    "postgresql": _PostgresqlGuard,
    "mysql": _MysqlGuard,
    "mariadb": _MysqlGuard,
    "sqlite": _SqliteGuard,
}


def _make_guard(database: _Database, connection: Any, settings: _Settings) -> _Guard:
    guard = _GUARDS.get(database.engine.name, _Guard)
    as_by_alembic = database.options.get("transactional_ddl") is False

    if connection is None or (database.is_sqlite and as_by_alembic):
        guard = _Guard

    return guard(database, connection, settings)


def _is_autocommit(connection: Any) -> bool:
    return "AUTOCOMMIT" in connection.get_execution_options().values()


def _listening(connection: Any, **listeners: Any) -> contextlib.ExitStack:
    """Listen to a connection's events; one of them returns what is to be executed."""
    stack = contextlib.ExitStack()

    for name, listener in listeners.items():
        event.listen(connection, name, listener, retval=name == "before_cursor_execute")
        stack.callback(event.remove, connection, name, listener)

    return stack


def _wait(name: str, timeout: float | None, attempt: cabc.Callable[[], bool]) -> None:
    """Try for a lock until it is ours, with a pause that grows."""
    limit = float("inf") if timeout is None else timeout
    began = time.monotonic()
    pause = 0.02
    telling = 1.0

    while not attempt():
        waited = time.monotonic() - began

        if waited >= limit:
            raise MigrationLockTimeout(name, waited)

        if waited >= telling:
            telling *= 2
            _logger.info("Waiting for the lock to migrate '%s' (%.0f s).", name, waited)

        time.sleep(min(pause, limit - waited))
        pause = min(pause * 1.5, 0.5)


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


def _read(path: str) -> str:
    """The text of a file, however a version control system has ended the lines."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _make_folders(settings: _Settings, names: cabc.Collection[str]) -> None:
    """Make what is missing; replace Alembic's unchanged template by that for several."""
    spec: Any = importlib.util.find_spec("alembic")  # without importing it
    templates = f"{os.path.dirname(spec.origin)}/templates"
    generic = f"{templates}/generic/script.py.mako"
    wanted = f"{templates}/multidb/script.py.mako" if len(names) > 1 else generic

    try:
        for folder in (settings.home, *settings.locations):
            os.makedirs(folder, exist_ok=True)

        if wanted != generic and _read(settings.template) == _read(generic):
            os.remove(settings.template)

        if not os.path.isfile(settings.template):
            shutil.copyfile(wanted, settings.template)
    except OSError as error:
        raise FlaskAlembicError(f"Cannot write '{settings.home}': {error}.") from error


def _check_template(template: str, names: cabc.Collection[str], empty: bool) -> None:
    """Refuse a template that would write a file without its operations."""
    text = _read(template)
    # What Alembic's templates, and those that follow them, render operations by.
    for_several = "_upgrades" in text
    for_one = re.search(r"\bupgrades\b", text) or (empty and not for_several)

    if len(names) > 1:
        for_one = for_several
        bad = [name for name in names if not name.isidentifier()]

        if bad:
            raise FlaskAlembicError(f"{_quoted(bad)} cannot be in a function's name.")

    if not for_one:
        more = _binds_to_name() if for_several else ""
        raise FlaskAlembicError(
            f"'{template}' is not for {_quoted(names)}: rename it and run"
            f" {_typed('mkdir')}{more}."
        )


def _binds_to_name() -> str:
    """What to write for the binds of Flask-SQLAlchemy."""
    db = current_app.extensions.get("sqlalchemy")
    pairs = ['"default": db.metadata']

    for name in getattr(db, "metadatas", ()):
        if name:
            pairs.append(f'"{name}": db.metadatas["{name}"]')

    return f", or write Alembic(metadatas={{{', '.join(pairs)}}})"


def _write_revision(
    session: _Session, request: _Request, connects: bool
) -> list[Script]:
    """Write revision files: Alembic's own way, without its printing."""
    from alembic.autogenerate import RevisionContext

    extension = session.extension
    script = extension.script_directory
    names = extension.metadatas or ["default"]
    extension.mkdir()
    _check_template(session.settings.template, names, request.empty)
    # The template asks for them; a subclass may have made the configuration.
    session.config.set_main_option("databases", ", ".join(names))
    arguments = _revision_arguments(session, script, request)
    revisions: Any = RevisionContext(session.config, script, arguments)
    # Not 'get_heads()': a head that another branch depends on has no row.
    heads = tuple(each.revision for each in script.get_revisions("heads"))

    for name in session.databases if connects else ():
        context: Any = extension.migration_contexts[name]
        revisions.template_args.update(context.opts.get("template_args", {}))

        if not request.empty:
            _refuse_comparison(session, name)

        with _comparing(session, context):
            run = revisions.run_autogenerate
            (revisions.run_no_autogenerate if request.empty else run)(heads, context)

    made = revisions.generated_revisions

    if not request.empty:
        made[:] = [x for x in made if any(ops.ops for ops in x.upgrade_ops_list)]

    try:
        # Of its post-write hooks, Alembic tells on stdout.
        with contextlib.redirect_stdout(sys.stderr):
            written = [*filter(None, revisions.generate_scripts())]
    except OSError as error:
        place = error.filename or arguments["version_path"]
        raise FlaskAlembicError(f"Cannot use '{place}': {error}.") from error

    # It knows files now that its signature does not: they may be deleted again.
    extension._get_cache().loaded = None

    for each in made:
        for operations in each.upgrade_ops_list:
            _tell_doubts(operations)

    return written


def _revision_arguments(
    session: _Session, script: ScriptDirectory, request: _Request
) -> dict[str, Any]:
    """What Alembic's own command would have been given, after a look at it."""
    branch = request.branch
    known = {*_revisions_by_id(script)}
    named = _labels(script)
    labels = _as_list(request.label)
    parents = request.parent

    if parents == "head":
        parents = _parents_in_branch(session, script, branch)

    is_default = branch == "default" and (parents, request.parent) != ("base", "head")

    if branch not in named and not is_default:
        labels.append(branch)  # it is the first of its branch

    rev_id = request.rev_id

    if rev_id is None:
        rev_id = _free_id(session.extension, known)

    _check_names(rev_id, labels, known | named)
    found = _scripts(script, parents)
    depends = [] if request.depend is None else _scripts(script, request.depend)

    if request.depend is not None and not depends:
        raise _command_error(f"{request.depend!r} cannot be depended on.")

    if not isinstance(request.message, str):
        raise _command_error(f"{request.message!r} is no message.")

    return {
        "message": _docstring(request.message),
        "autogenerate": not request.empty,
        "sql": False,
        "rev_id": rev_id,
        "head": [each.revision for each in found] or "base",
        "splice": request.splice,
        "branch_label": list(dict.fromkeys(labels)) or None,
        "version_path": _location(session.settings, request, found),
        "depends_on": [each.revision for each in depends] or None,
    }


def _parents_in_branch(session: _Session, script: Any, branch: str) -> Any:
    """What a branch's next revision follows."""
    named = _labels(script)

    if branch in named:
        return f"{branch}@head"

    # A history from elsewhere has no labels: its head is the default branch's.
    heads = script.get_revisions(script.get_heads())
    unlabelled = [each.revision for each in heads if not each.branch_labels]

    if branch != "default":
        return "base"

    if len(unlabelled) > 1:
        raise _several_heads(unlabelled)

    others = named - session.settings.folders.keys()

    if others and not unlabelled:
        text = f"Continue {_quoted(others)} by '-b', or begin anew by '-p base'."
        raise _command_error(text)

    return unlabelled or "base"


def _free_id(extension: Alembic, known: cabc.Container[str]) -> str:
    """A new id; a number that is taken, as two within a second are, is stepped past."""
    new = str(extension.rev_id())

    while new.isdecimal() and new in known:
        new = str(int(new) + 1).zfill(len(new))

    return new


def _check_names(rev_id: str, labels: list[Any], taken: set[str]) -> None:
    """Refuse an id or labels that would break the history."""
    taken |= {"base", "head", "heads", "current"}
    forms: dict[Any, str] = dict.fromkeys(labels, r"[^\s@:+]+")
    forms[rev_id] = r"\w[\w.]{0,31}"  # the column has 32

    for name, form in forms.items():
        is_good = isinstance(name, str) and re.fullmatch(form, name)

        if not is_good or name in taken or rev_id in labels:
            raise _command_error(f"{name!r} is taken, or can be no id or branch.")


def _location(settings: _Settings, request: _Request, parents: list[Script]) -> str:
    """The version location to write to: that of the branch, or of the parents."""
    folders = settings.folders

    if request.path is not None:
        root = current_app.root_path
        return folders.get(str(request.path)) or _folder(root, request.path, "path")

    if parents and request.parent != "head":
        folder = os.path.dirname(parents[0].path)

        if folder in settings.locations:
            return folder

    return folders.get(request.branch, folders[None])


def _docstring(message: str) -> str:
    """A message as it starts a docstring, and never becomes code."""
    text = message.replace("\\", r"\\").replace('"', r"\"")
    return "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)


@contextlib.contextmanager
def _comparing(session: _Session, context: Any) -> cabc.Generator[None]:
    """Let the user's hooks find ``alembic.context``, as in a run of migrations."""
    if _running.get():  # within a revision, whose own environment must stay
        yield
        return

    with _taking_turn(session), context.environment_context:
        with _reading(context.connection):
            yield


def _refuse_comparison(session: _Session, name: str) -> None:
    """Refuse a database that is behind, or models that seem not to be imported."""
    if unknown := _status(session)[name].unknown:
        raise _unknown_error(session, name, unknown)

    if count := len(_status(session)[name].pending):
        text = f"Database '{name}' is {_count_of(count)} behind"
        raise _command_error(f"{text}: run {_typed('upgrade')}.")

    if tables := _tables_without_models(session, name):
        raise FlaskAlembicError(
            f"The metadata of database '{name}' has no table, but the database has"
            f" {_quoted(tables)}: import the models, or drop them by --empty."
        )


def _tables_without_models(session: _Session, name: str) -> list[str]:
    """The tables of a database whose metadata has none at all."""
    from alembic.autogenerate.api import AutogenContext

    context = session.extension.migration_contexts[name]
    compared: Any = AutogenContext(context)

    if any(each.tables for each in _as_list(compared.metadata)):
        return []

    with _comparing(session, context):
        found = compared.inspector.get_table_names()
        where = {"schema_name": None}
        return [x for x in found if compared.run_name_filters(x, "table", where)]


def _produce_migrations(session: _Session) -> MigrationScript:
    from alembic.autogenerate import produce_migrations
    from alembic.operations.ops import MigrationScript

    made: Any = MigrationScript(None, [], [])  # type: ignore[arg-type]

    for context in session.extension.migration_contexts.values():
        with _comparing(session, context):
            script = produce_migrations(context, context.opts["target_metadata"])

        made.upgrade_ops_list.extend(script.upgrade_ops_list)
        made.downgrade_ops_list.extend(script.downgrade_ops_list)

    return made


def _tell_doubts(operations: Any) -> None:
    """Tell what deserves a look in a file that was written."""
    from alembic.operations import ops

    lost = "Look at it: %s '%s' is dropped, and its data is lost. A rename?"

    for each in operations.ops:
        if isinstance(each, ops.OpContainer):
            _tell_doubts(each)
        elif isinstance(each, ops.DropTableOp):
            _logger.info(lost, "table", each.table_name)
        elif isinstance(each, ops.DropColumnOp):
            _logger.info(lost, "column", f"{each.table_name}.{each.column_name}")
        elif isinstance(each, ops.AddColumnOp) and not each.column.nullable:
            if each.column.server_default is None:
                _logger.info(
                    "Look at it: column '%s.%s' is NOT NULL without a server default,"
                    " which fails where the table has rows.",
                    each.table_name,
                    each.column.name,
                )


def _context_options(session: _Session, name: str) -> dict[str, Any]:
    """All ``configure`` options of one database, with our hooks."""
    database = session.databases[name]
    options = {**database.options, "target_metadata": database.metadata}
    options["database"] = name

    if len(session.all_databases) > 1:
        text = _read(session.settings.template) if name == "default" else ""
        token = "" if "bind_names" in text else name  # Flask-Migrate has no 'default'
        options["upgrade_token"] = f"{token}_upgrades"
        options["downgrade_token"] = f"{token}_downgrades"

    hooks = _Hooks(database, session.settings.exclude_tables)
    options["include_name"] = hooks.include_name
    options["include_object"] = hooks.include_object

    if options.get("user_module_prefix") is None:
        options["render_item"] = hooks.render_item

    if options.get("compare_server_default"):
        options["compare_server_default"] = hooks.compare_server_default

    return options


class _Hooks:
    """What Alembic asks us while it compares; the user's callables answer first."""

    def __init__(self, database: _Database, exclude: cabc.Sequence[str]) -> None:
        self.user = database.options
        self.dialect = database.engine.dialect
        self.globs = ["*alembic_version*", self.user["version_table"], *exclude]

    def is_ours(self, name: str, schema: str | None) -> bool:
        """Whether no glob matches the name or, with a dot in it, schema and name."""
        full = f"{schema or self.dialect.default_schema_name}.{name}"
        return not any(fnmatchcase(full if "." in x else name, x) for x in self.globs)

    def include_name(self, name: Any, kind: str, parents: Any) -> bool:
        user = self.user.get("include_name")

        if user is not None and not user(name, kind, parents):
            return False

        return kind != "table" or self.is_ours(name, parents["schema_name"])

    def include_object(
        self, item: Any, name: Any, kind: str, reflected: bool, other: Any
    ) -> bool:
        user = self.user.get("include_object")
        default = getattr(other, "server_default", None)

        if isinstance(default, (sa.Computed, sa.Identity)):
            # Alembic 1.18 and later take its text before they ask a callable.
            vars(default).setdefault("arg", sa.text(""))

        if user is not None and not user(item, name, kind, reflected, other):
            return False

        table = item if kind == "table" else getattr(item, "table", None)
        return table is None or self.is_ours(table.name, table.schema)

    def render_item(self, kind: str, item: Any, context: Any) -> Any:
        """Import the module of a type of the user's."""
        user = self.user.get("render_item")
        code = user(kind, item, context) if user is not None else False
        module = type(item).__module__

        if code is False and kind == "type" and not module.startswith("sqlalchemy."):
            context.imports.add(f"import {module}")

        return code

    def compare_server_default(
        self, context: Any, found: Any, wanted: Any, *texts: Any
    ) -> Any:
        """Compare quoted literals, as Alembic's own question fails on some of them."""
        user = self.user["compare_server_default"]
        answer = None

        if callable(user):
            answer = user(context, found, wanted, *texts)

        if answer is not None or self.dialect.name not in ("sqlite", "postgresql"):
            return answer

        return _is_literal_changed(found, wanted, texts)


def _is_literal_changed(found: Any, wanted: Any, texts: Any) -> bool | None:
    """Whether one quoted literal became another; ``None``: Alembic is to decide."""
    old, default, new = texts

    # Alembic hands on a string as it is, and a text() as it is written in SQL.
    if isinstance(getattr(default, "arg", None), str):
        escaped = default.arg.replace("'", "''")
        new = f"'{escaped}'"

    literal = r"('(?:[^']|'')*')(?:::[\w .\"]+)?"
    old_literal = re.fullmatch(literal, old or "")
    new_literal = re.fullmatch(literal, new or "")

    if old_literal is None or new_literal is None:
        return None

    if old_literal[1] == new_literal[1]:
        return False

    # Of other types, the server may write one value in many ways.
    is_text = isinstance(found.type, (sa.String, sa.JSON))
    return True if is_text and found.type.__visit_name__ != "JSONB" else None


# -- Quick look ------------------------------------------------------------------------
# Most starts have nothing to upgrade, and the text of the revision files says so,
# without importing Alembic or running a file. In any doubt, Alembic is asked.


def _is_current(session: _Session) -> bool:
    """Whether surely nothing is to run; an import that would fail goes unseen."""
    settings = session.settings
    # A subclass may see to it that other files or tables are looked at.
    asked = (type(session.extension), session.job.kind, session.job.target)
    is_odd = settings.is_on("sourceless") or settings.is_on(
        "recursive_version_locations"
    )

    if is_odd or asked != (Alembic, "upgrade", "heads"):
        return False

    found = set()

    for name, database in session.databases.items():
        connection = session.connect(name)

        if connection.in_transaction():
            return False  # a query that fails would end the caller's transaction

        try:
            with _reading(connection):
                found.add(frozenset(_rows_of(database, connection)))
        except exc.DBAPIError:
            return False

    # The files cost most, so they are read last.
    return len(found) == 1 and _quick_heads(settings.locations) in found


def _quick_heads(locations: cabc.Iterable[str]) -> frozenset[str] | None:
    """The version table's rows when all is done; ``None``: Alembic must be asked."""
    import graphlib

    below: dict[str, list[str]] = {}
    names = ["", "base", "head", "heads"]  # not for ids: three are targets

    try:
        for path in _revision_files(locations):
            found = _read_assignments(_read(path))
            [id_] = found["revision"]
            below[id_] = found["down_revision"] + found.get("depends_on", [])
            names.extend([id_, *found.get("branch_labels", [])])

        graphlib.TopologicalSorter(below).prepare()  # fails if there is a loop
    except (OSError, ValueError, LookupError, SyntaxError):
        return None  # whatever it is, Alembic says it better

    covered = {id_ for ids in below.values() for id_ in ids}

    # A name is there twice, or one of the ids is missing (or is a label or a prefix).
    if len({*names}) < len(names) or covered - below.keys():
        return None

    return frozenset(below.keys() - covered)  # dependencies have no row: "real heads"


def _revision_files(locations: cabc.Iterable[str]) -> cabc.Iterator[str]:
    for location in filter(os.path.isdir, locations):
        for entry in [*os.scandir(location)]:
            if entry.is_symlink():
                raise ValueError("Alembic goes by the name that it leads to")

            if entry.is_file() and re.match(r"(?!\.#|__init__).*\.py$", entry.name):
                yield entry.path


def _read_assignments(text: str) -> dict[str, list[str]]:
    """The four names of a revision file, each assigned a plain literal in one line."""
    found = re.findall(
        r"(?m)^(revision|down_revision|branch_labels|depends_on)\b[^=\n]*=[ \t]*(.*)$",
        text,
    )
    names = [name for name, _ in found]

    for name in ("down_revision", "branch_labels", "depends_on"):
        count = text.count(name)

        if count > 1 or count != names.count(name):
            raise ValueError(f"'{name}' stands elsewhere, too")

    # With that of 'down_revision'; what is no assignment does not matter.
    if len(re.findall(r"revision\b[^=\n()]*=(?!=)", text)) != 2:
        raise ValueError("'revision' is assigned elsewhere, too")

    return {name: _read_literal(value) for name, value in found}


def _read_literal(value: str) -> list[str]:
    """``None``, a string, or strings in a tuple or list."""
    if value == "None":
        return []

    if simple := re.fullmatch(r"""(['"])([^'"\\]*)\1""", value):
        return [simple[2]]

    from ast import literal_eval

    names = _as_list(literal_eval(value))

    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value} is no name")

    return names


# -- Commands --------------------------------------------------------------------------
# Each parses, calls one method and prints what it returns; any can be mounted anywhere.

_VERBOSE: Final = "flask_alembic.verbose"


class _Command(click.Command):
    """Takes ``-2`` for an argument, and makes one line of an error of the user's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text = "Show more, and the traceback of an error."
        self.params.append(click.Option(["-v", "--verbose"], is_flag=True, help=text))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, [*args])
        except click.NoSuchOption as error:
            if error.option_name in ("-d", "--directory"):  # as of Flask-Migrate
                text = "The folder is ALEMBIC['script_location'] of the configuration."
                raise click.UsageError(text, ctx) from error

            if not error.option_name.lstrip("-").isdecimal():
                raise

        ctx.ignore_unknown_options = True
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        is_verbose = ctx.params.pop("verbose")
        ctx.meta[_VERBOSE] = is_verbose

        try:
            alembic = logging.getLogger("alembic")

            with _shown(_logger, logging.INFO), _shown(alembic, logging.WARNING):
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # That of an event loop stands for a cancellation, which has the notes.
            _say("\n".join(["", *(_notes(error) or _notes(error.__context__))]))
            raise
        except (Exception, SystemExit) as error:
            of_click = (click.ClickException, click.exceptions.Exit, BrokenPipeError)

            if isinstance(error, of_click) and not _notes(error):
                raise  # else a revision raised it

            raise _failure(error, is_verbose) from error


def _notes(error: BaseException | None) -> list[str]:
    return getattr(error, "__notes__", [])


def _failure(error: BaseException, is_verbose: bool) -> Exception:
    """What a command ends with: one line, or the error of a revision."""
    from alembic.util import CommandError

    notes = _notes(error)
    text = "\n".join([_one_line(getattr(error, "orig", None) or error), *notes])
    trace = traceback.TracebackException.from_exception(error)

    if is_verbose:
        _say("".join(trace.format()).rstrip())

    if isinstance(error, (FlaskAlembicError, CommandError)):
        return click.ClickException(text)

    locations = _extension()._get_cache().settings.locations
    own = [each for each in trace.stack if os.path.dirname(each.filename) in locations]

    if notes and notes[0].startswith(_NO_CONNECTION):
        return click.ClickException(notes[0])

    if isinstance(error, exc.DBAPIError) and not own:
        return click.ClickException(f"The database cannot be used: {text}")

    if own:
        trace.stack = traceback.StackSummary.from_list(own)
        trace.__cause__ = None
        trace.__context__ = None

    if not is_verbose:
        _say("".join(trace.format()).rstrip())

    return click.exceptions.Exit(1)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


@contextlib.contextmanager
def _shown(logger: logging.Logger, level: int) -> cabc.Generator[None]:
    """Show the lines of a logger, unless it is Alembic's and the application does."""
    if logger is not _logger and logging.root.handlers:
        yield
        return

    former = vars(logger).copy()
    logger.handlers = [_Handler()]
    logger.propagate = False
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


def _paint(text: str, color: str) -> str:
    return text if os.environ.get("NO_COLOR") else click.style(text, color)


def _extension() -> Alembic:
    if "alembic" not in current_app.extensions:
        raise FlaskAlembicError("Not set up: call 'alembic.init_app(app)' first.")

    return current_app.extensions["alembic"]


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given: the method of a subclass may take no others."""
    return {key: value for key, value in options.items() if value}


#: The commands, for applications that mount them under a group of their own.
cli: Final[AppGroup] = AppGroup("db", help="Perform database migrations.")


def _command(name: str) -> Any:
    return cli.command(name, cls=_Command)


def _option(*names: str, text: str, metavar: str | None = None) -> Any:
    """An option that can be repeated."""
    text = f"{text} Can be repeated."
    return click.option(*names, multiple=True, metavar=metavar, help=text)


def _flag(*names: str, text: str, hidden: bool = False) -> Any:
    return click.option(*names, is_flag=True, hidden=hidden, help=text)


_database = _option(
    "-n", "--database", metavar="NAME", text="Database to work on, instead of all."
)
_message = click.option("-m", "--message", help="What the revision does.")
_label = _option(
    "-l", "--label", "--branch-label", "label", text="Further label for its branch."
)
_rev_id = click.option("--rev-id", help="Its revision id, instead of a timestamp.")
_splice = _flag("--splice", text="Allow a parent that is not a head.")
_sql = _flag("--sql", text="Print the SQL script instead of running it.")
_tag = click.option("--tag", help="Value of context.get_tag_argument().")
_x = _option(
    "-x", "--x-arg", "x", metavar="KEY=VALUE", text="Value of context.get_x_argument()."
)
_quiet = _flag("-q", "--quiet", text="Show no progress.")
_indicate = _flag("-i", "--indicate-current", text="Mark the current revisions.")


@_command("mkdir")
def _db_mkdir() -> None:
    """Make the migrations folder, if it is missing (alias: init)."""
    home = _extension()._get_cache().settings.home
    is_there = os.path.isdir(home)
    _extension().mkdir()
    _say(f"'{home}' is there already." if is_there else f"Made '{home}'.")


@_command("revision")
@click.argument("text", metavar="[MESSAGE]", required=False)
@_message
@_flag("--empty", text="Write an empty revision; compare nothing.")
@click.option("-b", "--branch", help="Branch to continue, or to start.")
@_option("-p", "--parent", "--head", "parent", text="Revision that it follows.")
@_splice
@_option("-d", "--depend", "--depends-on", "depend", text="Revision to run before it.")
@_label
@click.option("--path", "--version-path", "path", help="Version location to write to.")
@_rev_id
@_flag("--autogenerate", hidden=True, text="As it does anyhow.")
@_x
@_database
def _db_revision(text: str, message: str, autogenerate: bool, **options: Any) -> None:
    """Write a revision from what changed in models (alias: migrate).

    MESSAGE says what. The databases, which the models are compared with, have to be
    up to date. Review the file. When nothing changed, none is written.
    """
    if text and message:
        raise click.UsageError("Give the message either as MESSAGE or with '-m'.")

    alembic = _extension()
    _tell_env_file(alembic)
    detected = logging.getLogger("alembic.autogenerate")

    with _shown(detected, logging.INFO):
        made = alembic.revision(text or message or "", **_given(**options))

    for script in made:
        click.echo(script.path)

    if not made:
        models = [x.metadata for x in _find_databases(alembic).values()]
        has_tables = any(x.tables for each in models for x in _as_list(each))
        advice = "give --empty" if has_tables else "no table: import the models"
        _say(f"No changes detected; {advice}.")


def _tell_env_file(alembic: Alembic) -> None:
    path = os.path.join(alembic._get_cache().settings.home, "env.py")

    if os.path.isfile(path):
        where = "ALEMBIC and ALEMBIC_CONTEXT"
        _say(f"'{path}' is not run: what it sets belongs into {where}.")


@_command("merge")
@click.argument("revisions", nargs=-1)
@_message
@_label
@_rev_id
@_splice
def _db_merge(revisions: Any, **options: Any) -> None:
    """Write a revision that joins REVISIONS, by default all heads."""
    made = _extension().merge(revisions or "heads", **_given(**options))
    click.echo(made.path)


@_command("upgrade")
@click.argument("target", default="heads")
@_sql
@_flag("--allow-newer", text="Leave databases alone that a newer release has migrated.")
@_quiet
@_tag
@_x
@_database
def _db_upgrade(target: str, **options: Any) -> None:
    """Run the revisions that lead up to TARGET, by default to all heads.

    TARGET is a revision id or its beginning, 'head', 'BRANCH@head', or steps: '+2'.
    --sql takes [START:]TARGET; START is 'base', or 'current' to ask the database.
    """
    _run_command("upgrade", [target], **options)


@_command("downgrade")
@click.argument("target", default="-1")
@_sql
@_quiet
@_tag
@_x
@_database
def _db_downgrade(target: str, **options: Any) -> None:
    """Undo the last revision, or all down to TARGET, by default '-1'.

    TARGET is a revision id or its beginning, 'base', 'BRANCH@base', or steps: '-2',
    'BRANCH@-1'. --sql takes START:TARGET; START may be 'current', to ask.
    """
    if options["sql"] and ":" not in target:
        raise click.UsageError("'--sql' needs START:TARGET here, as 'current:-1'.")

    _run_command("downgrade", [target], **options)


@_command("stamp")
@click.argument("targets", nargs=-1)
@_flag("--purge", text="Delete all rows of the version table first.")
@_sql
@_tag
@_x
@_database
def _db_stamp(targets: Any, **options: Any) -> None:
    """Write TARGETS, by default 'heads', into the version table; run nothing.

    TARGETS are revision ids or their beginnings, 'heads', 'base' or 'BRANCH@head'.
    Rows of branches not named stay. With --sql, the first may be START:TARGET.
    """
    if options["sql"] and options["purge"]:
        raise click.UsageError("Give either '--sql' or '--purge'.")

    _run_command("stamp", targets or ["heads"], **options)


def _run_command(
    verb: str,
    targets: cabc.Sequence[str],
    sql: bool,
    quiet: bool = False,
    **options: Any,
) -> None:
    """Upgrade, downgrade or stamp, telling of the progress; or print SQL."""
    alembic: Any = _extension()
    start, colon, first = targets[0].rpartition(":")
    target = [first, *targets[1:]] if targets[1:] else first
    given = _given(**options)

    if not first or (colon and not sql):
        raise click.UsageError(f"'{targets[0]}' is no target; START: needs --sql.")

    if sql:
        given.pop("allow_newer", None)
        return _echo_sql(
            getattr(alembic, f"{verb}_sql")(target, start or "base", **given)
        )

    method = getattr(alembic, verb)
    began = time.perf_counter()

    # An override with the predecessor's signature takes none.
    if not quiet and "progress" in inspect.signature(method).parameters:
        given["progress"] = _progress(len(alembic.databases) > 1)

    done = method(target, **given)

    if done is None or quiet:  # as overrides may return
        return

    if verb == "stamp":
        _echo_scripts(done)

    took = time.perf_counter() - began
    nothing = (
        "Stamped: no revision is recorded." if verb == "stamp" else "Nothing to do."
    )
    ran = f"{_count_of(len(done))} {verb}d in {took:.2f}s."

    if not done or verb != "stamp":
        _say(ran if done else nothing)


def _progress(several: bool) -> Progress:
    def show(name: str, script: Script, place: int, count: int, took: float) -> None:
        words = [f"{place:>3}/{count}", _paint(script.revision, "cyan")]

        if several:
            words.insert(1, name)

        if _summary(script):
            words.append(_summary(script))

        _say(f"{'  '.join(words)} ... {took:.2f}s")

    return show


def _echo_sql(scripts: dict[str, str]) -> None:
    for name, text in scripts.items():
        if len(scripts) > 1:
            click.echo(f"-- Database: {name}\n")

        click.echo(f"{text.rstrip()}\n")


@_command("status")
@_flag("--json", text="Print JSON.")
@_database
def _db_status(json: bool, **options: Any) -> None:
    """Show where each database stands, and what is pending."""
    states = _extension().status(**_given(**options))

    if json:
        from json import dumps

        data = {name: _status_data(state) for name, state in states.items()}
        return click.echo(dumps({"databases": data}, indent=2))

    for name, state in states.items():
        click.echo(f"{name}: {_status_words(state)}")

        for kind in ("current", "heads", "pending"):
            for script in getattr(state, kind):
                line = f"  {kind.removesuffix('s'):<7}  {script.revision}"
                click.echo(f"{line}  {_summary(script)}".rstrip())


def _status_data(state: DatabaseStatus) -> dict[str, Any]:
    pending = []

    for script in state.pending:
        words = {"message": _summary(script), "path": script.path}
        pending.append({"revision": script.revision, **words})

    current = [script.revision for script in state.current]
    heads = [script.revision for script in state.heads]
    return {**state._asdict(), "current": current, "heads": heads, "pending": pending}


def _status_words(state: DatabaseStatus) -> str:
    if state.unknown:
        return _paint(f"unknown ids: {', '.join(state.unknown)}", "red")

    if not state.heads:
        return f"no revisions yet\n  {_typed('revision MESSAGE')} makes the first"

    if state.pending:
        return _paint(f"{_count_of(len(state.pending))} pending", "yellow")

    return _paint("up to date", "green")


@_command("current")
@_flag("-c", "--check-heads", text="Exit with 1 unless all heads are there.")
@_database
def _db_current(check_heads: bool, database: Any) -> None:
    """Show the revisions that each database is at."""
    alembic = _extension()
    names = database or alembic.databases
    found = {name: alembic.current(name) for name in names}

    for name, scripts in found.items():
        if len(names) > 1:
            click.echo(f"Database: {name}")

        _echo_scripts(scripts)

    if check_heads and alembic.needs_upgrade(names):
        click.echo("Database is not on all head revisions")
        raise click.exceptions.Exit(1)


@_command("check")
@_database
def _db_check(database: Any) -> None:
    """Exit with 1 if models and databases differ, or a branch has several heads."""
    alembic = _extension()
    _tell_env_file(alembic)
    lines = _heads_to_merge(alembic)

    for name in database or alembic.databases:
        alembic.current(name)  # an unknown id is an error
        find_tables = functools.partial(_tables_without_models, name=name)

        if alembic._call(find_tables, database=name):
            lines.append(f"Database '{name}' has tables, its metadata none: import it.")

        if diffs := alembic.compare_metadata(name):
            lines.append(f"Changes detected in database '{name}':")
            lines.extend(f"  {_words_of(diff)}" for diff in diffs)

    click.echo("\n".join(lines or ["No changes detected."]))

    if lines:
        raise click.exceptions.Exit(1)


def _heads_to_merge(alembic: Alembic) -> list[str]:
    """A line for each branch that has more than one head."""
    branches: dict[str, list[str]] = {}

    for head in alembic.heads():
        for branch in head.branch_labels or ["default"]:
            branches.setdefault(branch, []).append(head.revision)

    several = {str(_several_heads(x)): name for name, x in branches.items() if x[1:]}
    return [f"Branch '{name}': {text}" for text, name in several.items()]


def _words_of(diff: Any) -> str:
    """A difference, as Alembic's tuples have it, in words."""
    if isinstance(diff, list):  # of one column
        return "\n  ".join(map(_words_of, diff))

    verb, _, what = diff[0].partition("_")
    verb = {"add": "added", "remove": "removed", "modify": "changed"}.get(verb, verb)
    what = what.replace("fk", "foreign key").replace("_", " ")

    if verb == "changed":
        return f"{verb} {what} of column '{diff[2]}.{diff[3]}'"

    if what == "column":
        return f"{verb} column '{diff[2]}.{diff[3].name}'"

    table = getattr(diff[1], "table", None)
    where = "" if table is None else f" of '{table.name}'"
    return f"{verb} {what} '{getattr(diff[1], 'name', diff[1])}'{where}"


@_command("heads")
@_flag("--resolve-dependencies", text="Leave out dependencies.")
def _db_heads(**options: Any) -> None:
    """Show the revisions that no other follows."""
    _echo_scripts(_extension().heads(**options))


@_command("branches")
def _db_branches() -> None:
    """Show the revisions that several others follow, and which."""
    alembic = _extension()

    for script in alembic.branches():
        _echo_scripts([script])

        for each in _scripts(alembic.script_directory, sorted(script.nextrev)):
            click.echo(f"    -> {each.revision}  {_summary(each)}".rstrip())


@_command("log")
@click.option("--start", help="Oldest revision to show.")
@click.option("--end", help="Newest revision to show.")
@click.option("-r", "--rev-range", metavar="A:B", help="Short for --start A --end B.")
@_indicate
@_database
def _db_log(start: str, end: str, rev_range: str, **marks: Any) -> None:
    """Show the history, newest first (alias: history).

    Either end is a revision id or its beginning, 'BRANCH@head', or 'current'.
    """
    if rev_range:
        if start or end or ":" not in rev_range:
            raise click.UsageError("'-r' takes A:B, in place of '--start' and '--end'.")

        start, _, end = rev_range.partition(":")

    _echo_scripts(_extension().log(start or "base", end or "heads"), **marks)


@_command("show")
@click.argument("revisions", nargs=-1)
@_indicate
@_database
def _db_show(revisions: Any, database: Any, indicate_current: bool) -> None:
    """Show REVISIONS (ids, 'BRANCH@head', 'current') in full, by default 'head'."""
    alembic = _extension()
    click.get_current_context().meta[_VERBOSE] = True

    for name in revisions or ["head"]:
        is_current = name == "current"
        found: Any = [] if is_current else _scripts(alembic.script_directory, name)
        found = alembic.current(database or None) if is_current else found
        _echo_scripts(found, database, indicate_current)


@_command("edit")
@click.argument("revision", default="head")
def _db_edit(revision: str) -> None:
    """Open the file of REVISION, by default of the head, in your $EDITOR."""
    for script in _scripts(_extension().script_directory, revision):
        click.edit(filename=script.path)


def _echo_scripts(
    scripts: cabc.Iterable[Script], database: Any = (), indicate_current: bool = False
) -> None:
    """Show revisions as Alembic does; its own mark is state that threads share."""
    verbose = click.get_current_context().meta[_VERBOSE]
    states = _extension().status(database or None) if indicate_current else {}

    for script in scripts:
        text = script.cmd_format(verbose, include_branches=True, include_parents=True)
        at = [name for name, state in states.items() if script in state.current]
        mark = f" (current: {', '.join(at)})" if at else ""

        if len(at) == len(states):
            mark = mark.replace(f": {', '.join(at)}", "")

        if verbose:
            click.echo(text.replace("\n", f"{mark}\n", 1))
        else:
            click.echo(f"{text}{mark}, {_summary(script)}".removesuffix(", "))


def _summary(script: Script) -> str:
    """The message in one line; without one, Alembic takes what follows for it."""
    text = _one_line(script.doc or "")
    return "" if text.startswith("Revision ID: ") else text


def _count_of(count: int) -> str:
    return "1 revision" if count == 1 else f"{count} revisions"


def _add_alias(name: str, alias: str) -> None:
    command = copy.copy(cli.commands[name])
    command.hidden = True
    cli.add_command(command, alias)


_add_alias("mkdir", "init")
_add_alias("revision", "migrate")
_add_alias("log", "history")
