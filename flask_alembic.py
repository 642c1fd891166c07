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
import decimal
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
import typing as t
import warnings
import weakref
from contextvars import ContextVar
from fnmatch import fnmatchcase

import click
import sqlalchemy as sa
from flask import Flask
from flask import current_app
from flask import g
from flask.cli import AppGroup
from sqlalchemy import event
from sqlalchemy import exc
from sqlalchemy.util import concurrency

if t.TYPE_CHECKING:
    from alembic.config import Config
    from alembic.operations import MigrationScript
    from alembic.operations import Operations
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.runtime.migration import RevisionStep
    from alembic.script import Script
    from alembic.script import ScriptDirectory
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Alembic", "DatabaseStatus", "RunOptions", "cli"]
__all__ += ["FlaskAlembicError", "MigrationLockTimeout"]

# -- Types and constants ---------------------------------------------------------------

_R = t.TypeVar("_R")
_Ids: t.TypeAlias = "tuple[str, ...]"
StepFunction: t.TypeAlias = "t.Callable[[t.Any, MigrationContext], t.Iterable[t.Any]]"
#: One revision or several: ids, unique prefixes, scripts, symbols (``users@head``).
RevisionTarget: t.TypeAlias = "str | int | Script | cabc.Sequence[str | Script]"
DatabaseNames: t.TypeAlias = "str | cabc.Sequence[str] | None"
XArguments: t.TypeAlias = "cabc.Mapping[str, t.Any] | cabc.Sequence[str] | str | None"
MetadataOption: t.TypeAlias = "sa.MetaData | cabc.Sequence[sa.MetaData]"
EngineOption: t.TypeAlias = "sa.Engine | AsyncEngine"

_logger: t.Final = logging.getLogger("flask_alembic")


class RunOptions(t.TypedDict, total=False):
    """What the methods that migrate take beside their target."""

    database: DatabaseNames  #: A name or several; all when left out.
    tag: str | None  #: For ``context.get_tag_argument()`` in revisions.
    x: XArguments  #: For ``context.get_x_argument()``: a dict, or ``KEY=VALUE``.


class DatabaseStatus(t.NamedTuple):
    """Where one database stands, as :meth:`Alembic.status` reports it."""

    current: tuple[Script, ...]  #: Revisions in the version table.
    heads: tuple[Script, ...]  #: Revisions that an upgrade leads to.
    pending: tuple[Script, ...]  #: What it runs, in order; none if ids are unknown.
    unknown: tuple[str, ...]  #: Ids in the version table that no revision file has.


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
            f" {seconds:.1f} s ('migration_lock_timeout'): see who migrates it."
        )


class _OvertakenError(FlaskAlembicError):
    """Another process migrated the database between two transactions of ours."""


def _line_of(error: BaseException) -> str | None:
    """What to print for a wrong request or set-up; ``None`` if a traceback is due."""
    notes: list[str] = getattr(error, "__notes__", [])
    text = " ".join(str(getattr(error, "orig", error)).split())
    if isinstance(error, FlaskAlembicError):
        return "\n".join([text, *notes])
    if notes:  # of a run that failed, or of a connection that was refused
        return notes[0] if notes[0].startswith("Cannot connect to") else None
    if isinstance(error, exc.DBAPIError):
        return f"The database cannot be used: {text}"
    module = sys.modules.get("alembic.util.exc")  # never imported, it never raised
    return text if module and isinstance(error, module.CommandError) else None


def _command_error(message: str) -> Exception:
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
        self._caches = weakref.WeakKeyDictionary[Flask, _Cache]()
        if app is not None:
            self.init_app(app)

    def init_app(
        self, app: Flask, run_mkdir: bool | None = None, command_name: str | None = None
    ) -> None:
        """Set up an application: its defaults, commands and (if it can be) folder."""
        app.extensions["alembic"], self._caches[app] = self, _Cache(self)
        options = _config_dict(app, "ALEMBIC")
        options.setdefault("script_location", "migrations")
        options.setdefault("version_locations", [])
        options.setdefault("path_separator", "os")
        _config_dict(app, "ALEMBIC_CONTEXT").setdefault("compare_server_default", True)
        template = _read_settings(app).template
        app.teardown_appcontext(self._close_context)
        if name := self.command_name if command_name is None else command_name:
            app.cli.add_command(cli, name)
        wanted = self.run_mkdir if run_mkdir is None else run_mkdir
        if wanted and not os.path.isfile(template):
            with contextlib.suppress(FlaskAlembicError), app.app_context():
                self.mkdir()

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
        config, cache = self.config, self._get_cache()
        # Python's filters of warnings, which loading sets, are the process's.
        with _process_lock("load"):
            known = cache.scripts
            if not known or known[0] is not config or known[1] != _signature(known[2]):
                known = cache.scripts = (config, *_load_scripts(config))
            return known[2]

    @property
    def environment_context(self) -> EnvironmentContext:
        """Alembic's environment of the ``default`` or only database."""
        from alembic.runtime.environment import EnvironmentContext

        scope, script = self._scope(), self.script_directory
        if not scope.environment:
            scope.environment = EnvironmentContext(scope.config, script, tag=scope.tag)
        return scope.environment

    @property
    def migration_contexts(self) -> dict[str, MigrationContext]:
        """A migration context per database, connected until the app context ends."""
        scope = self._scope()
        for name in scope.targets.keys() - scope.contexts.keys():
            env = self.environment_context
            if name != "default" and len(scope.targets) > 1:
                env = type(env)(env.config, env.script)
            env.configure(scope.connect(name), **_options(scope, name))
            scope.contexts[name] = env.get_context()
        return {name: scope.contexts[name] for name in scope.targets}

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

    #: Short names of the properties above.
    script: t.Final = script_directory
    env: t.Final = environment_context
    context: t.Final = migration_context

    @property
    def databases(self) -> tuple[str, ...]:
        """Names of the databases that are migrated."""
        return tuple(_find_targets(self))

    def run_sync(self, fn: cabc.Callable[..., _R], *args: t.Any) -> _R:
        """Call ``fn(*args)``; in it, low-level objects of async engines may be used."""
        return self._call(lambda scope: fn(*args))

    def mkdir(self) -> None:
        """Make the migrations folder, the version locations and ``script.py.mako``."""
        settings = self._get_cache().settings
        with _writing(settings.script_location):
            for folder in (settings.script_location, *settings.locations):
                os.makedirs(folder, exist_ok=True)
            _place_template(settings.template, self.metadatas)

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
        **options: t.Unpack[RunOptions],
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
        :return: The new revisions; none when autogenerate finds nothing.
        """
        script, settings = self.script_directory, self._get_cache().settings
        self.mkdir()
        _check_template(settings.template, self.metadatas or ["default"], empty)
        asked: dict[str, t.Any] = {"message": message, "autogenerate": not empty}
        asked |= {"rev_id": rev_id, "depends_on": depend, "version_path": path}
        asked |= {"head": parent, "splice": splice, "branch_label": label, "sql": False}
        _place(self, branch, asked)
        if not empty or settings.is_on("revision_environment"):
            return self._call(lambda x: _generate(x, script, asked), **options)
        # No database is needed, and so none is looked for.
        return _generate(_Scope(self, self._scope(), **options), script, asked)

    def merge(
        self,
        revisions: RevisionTarget = "heads",
        message: str | None = None,
        label: str | cabc.Sequence[str] | None = None,
        *,
        rev_id: str | None = None,
        splice: bool = False,
    ) -> Script:
        """Write a revision that joins revisions, or the heads of named branches."""
        script, names = self.script_directory, _names(revisions)
        labels, locations = _labels(script), self._get_cache().settings.locations
        found = _scripts(script, [f"{n}@head" if n in labels else n for n in names])
        if len(found) < 2:
            raise _command_error(f"'{' '.join(names)}': a merge needs two revisions.")
        options: t.Any = {"splice": splice, "label": label, "rev_id": rev_id}
        if (folder := os.path.dirname(found[0].path)) in locations:
            options["path"] = folder
        text = "merge heads" if message is None else message
        # Not by an override, which may refuse parents that a merge can have.
        return Alembic.revision(self, text, empty=True, parent=found, **options)[0]

    def upgrade(
        self, target: RevisionTarget = "heads", **options: t.Unpack[RunOptions]
    ) -> list[Script]:
        """Run the revisions that lead up to ``target``; those that ran are returned."""
        return self._migrate(_Job(self, "upgrade", _names(target)), **options)

    def downgrade(
        self, target: RevisionTarget = -1, **options: t.Unpack[RunOptions]
    ) -> list[Script]:
        """Run the downgrades down to ``target``; an int of either sign counts down."""
        return self._migrate(_Job(self, "downgrade", _names(target)), **options)

    def stamp(
        self,
        target: RevisionTarget = "heads",
        *,
        purge: bool = False,
        **options: t.Unpack[RunOptions],
    ) -> tuple[Script, ...]:
        """Write ``target`` as if it had run; other branches stay unless ``purge``."""
        self._migrate(_Job(self, "stamp", _names(target), purge=purge), **options)
        return self.current(options.get("database"))

    def run_migrations(self, fn: StepFunction, **kwargs: t.Any) -> None:
        """Run steps on the databases: the one way of every migration.

        All locks are taken, then all transactions opened, the steps run, all committed;
        on SQLite each revision is a transaction of its own. The error of a run that
        failed has a note that says where each database stands.

        :param fn: ``fn(heads, migration_context)`` returns the steps, perhaps anew.
        :param kwargs: Passed to each ``upgrade`` or ``downgrade`` function.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        scope = self._scope()
        if scope is not scope.base:  # a method such as 'upgrade' has chosen databases
            return _run_online(scope, fn, kwargs)
        return self._call(lambda inner: _run_online(inner, fn, kwargs))

    def upgrade_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: t.Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make an upgrade's SQL, by database; only to read ``current`` it connects."""
        return self._sql(_Job(self, "upgrade", _names(target), start), **options)

    def downgrade_sql(
        self, target: RevisionTarget, start: str, **options: t.Unpack[RunOptions]
    ) -> dict[str, str]:
        """Make the SQL script of a downgrade, by database name."""
        return self._sql(_Job(self, "downgrade", _names(target), start), **options)

    def stamp_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: t.Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make the SQL script of a stamp, by database name."""
        return self._sql(_Job(self, "stamp", _names(target), start), **options)

    def current(self, database: DatabaseNames = None) -> tuple[Script, ...]:
        """Get the revisions in the version tables; an unknown id is an error."""
        states = self.status(database)
        for name, state in states.items():
            rows = [*(each.revision for each in state.current), *state.unknown]
            _refuse_unknown(self._scope(), name, rows)
        return tuple(dict.fromkeys(x for s in states.values() for x in s.current))

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
        script: t.Any = self.script_directory
        given = [
            self.current() or "base" if x == "current" else x for x in (start, end)
        ]
        ends = [_names(each) for each in given]
        with _explained(script, (*ends[0], *ends[1])):
            lower, upper = (names[0] if len(names) == 1 else names for names in ends)
            return list(script.walk_revisions(lower, upper))

    def status(self, database: DatabaseNames = None) -> dict[str, DatabaseStatus]:
        """Tell where each database stands. Nothing is written, no table is made."""
        return self._call(_status, database=database)

    def needs_upgrade(self, database: DatabaseNames = None) -> bool:
        """Tell whether :meth:`upgrade` would run anything; unknown ids are an error."""
        job = _Job(self, "upgrade")
        return self._call(
            lambda x: not _is_current(x, job) and _has_work(x, job), database=database
        )

    def needs_revision(self, database: DatabaseNames = None) -> bool:
        """Tell whether models and database differ, as :meth:`compare_metadata` does."""
        return bool(self.compare_metadata(database))

    def compare_metadata(self, database: DatabaseNames = None) -> list[t.Any]:
        """List the differences between models and databases, as Alembic's tuples."""
        script = self.produce_migrations(database)
        return [diff for ops in script.upgrade_ops_list for diff in ops.as_diffs()]

    def produce_migrations(self, database: DatabaseNames = None) -> MigrationScript:
        """Make the operations, for each database, that would bring it to the models."""
        return self._call(_produce, database=database)

    def _get_cache(self) -> _Cache:
        """What is kept for the application. Subclasses reach it by this name."""
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001
        if app not in self._caches:
            raise FlaskAlembicError("Not set up: call 'alembic.init_app(app)' first.")
        return self._caches[app]

    def _scope(self) -> _Scope:
        """The innermost scope of this extension in this application context."""
        bases = g.setdefault("_flask_alembic", {})
        base: _Scope = bases.setdefault(self, _Scope(self))
        return next((s for s in reversed(_scopes.get()) if s.base is base), base)

    def _close_context(self, error: BaseException | None = None) -> None:
        if scope := g.get("_flask_alembic", {}).pop(self, None):
            scope.close()

    def _call(
        self, work: cabc.Callable[[_Scope], _R], /, **options: t.Unpack[RunOptions]
    ) -> _R:
        """Do a method's work in a scope, in an event loop where a driver needs one."""
        scope = _Scope(self, self._scope(), **options)

        def inside() -> _R:
            token = _scopes.set((*_scopes.get(), scope))
            try:
                return work(scope)
            finally:
                _scopes.reset(token)
                scope.close()

        is_async = any(x.engine.dialect.is_async for x in scope.targets.values())
        return _in_loop(inside) if is_async else inside()

    def _migrate(self, job: _Job, **options: t.Unpack[RunOptions]) -> list[Script]:
        def work(scope: _Scope) -> list[Script]:
            if not _is_current(scope, job, waits=False):
                self.run_migrations(job)
            return list(scope.ran.values())

        return self._call(work, **options)

    def _sql(self, job: _Job, **options: t.Unpack[RunOptions]) -> dict[str, str]:
        return self._call(lambda scope: _run_offline(scope, job), **options)


# -- State -----------------------------------------------------------------------------
# A cache lives as long as an application; a scope, as its method or context.


class _Cache:
    """What is kept for one application: its configuration and its revision files."""

    config: Config | None = None
    scripts: tuple[Config, t.Any, ScriptDirectory] | None = None

    def __init__(self, extension: Alembic) -> None:
        self._extension = extension

    @functools.cached_property
    def settings(self) -> _Settings:
        return _read_settings(current_app)

    def clear(self) -> None:
        """Forget all, and give back what this application context holds open."""
        self.config = self.scripts = None
        self.__dict__.pop("settings", None)
        scope: _Scope | None = self._extension._scope()
        while scope:
            scope.close()
            scope = scope.outer


class _Scope:
    """What one method, or one application context, has open, and what it works on."""

    def __init__(
        self,
        extension: Alembic,
        outer: _Scope | None = None,
        database: DatabaseNames = None,
        tag: str | None = None,
        x: XArguments = None,
    ) -> None:
        self.extension, self.outer, self.tag = extension, outer, tag
        self.x = [f"{k}={v}" for k, v in x.items()] if _is_mapping(x) else _as_list(x)
        self.base: _Scope = outer.base if outer else self
        self.environment: EnvironmentContext | None = None
        self.ran: dict[str, Script] = {}  #: What the last run completed, by id.
        # Only the innermost scope opens anything, so a copy knows all that is open.
        self.contexts: dict[str, MigrationContext] = {**outer.contexts} if outer else {}
        self.connections: dict[str, t.Any] = {**outer.connections} if outer else {}
        self._database, self._open = database, contextlib.ExitStack()

    @property
    def config(self) -> Config:
        """Alembic's configuration with the arguments that revisions may ask for."""
        config = self.extension.config
        if self.x:
            config = copy.copy(config)
            config.cmd_opts = t.cast(t.Any, self)  # Alembic asks it for 'x' alone
        return config

    @functools.cached_property
    def targets(self) -> dict[str, _Target]:
        """The databases of this scope: those that were asked for, or all."""
        found = _find_targets(self.extension)
        names = [*found] if self._database is None else _as_list(self._database)
        if not names or {*names} - found.keys():
            raise _command_error(f"{_quoted(names)}: databases are {_quoted(found)}.")
        return {name: found[name] for name in found if name in names}

    def connect(self, name: str) -> t.Any:
        """The connection to a database, opened when there is none."""
        if name not in self.connections:
            target = self.targets[name]
            if target.engine.dialect.is_async and not self.outer:
                raise FlaskAlembicError(f"'{name}' is async: use it in 'run_sync(fn)'.")
            self.connections[name] = self._open.enter_context(_connect(name, target))
        return self.connections[name]

    def close(self) -> None:
        """Give every connection that was opened here back to its pool."""
        self.environment = None
        self.contexts.clear()
        self.connections.clear()
        self._open.close()


_scopes: t.Final[ContextVar[tuple[_Scope, ...]]] = ContextVar("scopes", default=())
_locks: t.Final[dict[tuple[int, str], t.Any]] = {}


def _process_lock(name: str) -> t.Any:
    """One of this process's locks; a child that was forked meanwhile has its own."""
    return _locks.setdefault((os.getpid(), name), threading.RLock())


# -- Configuration ---------------------------------------------------------------------


class _Settings(t.NamedTuple):
    """``app.config["ALEMBIC"]``, checked and cast; the keys of ours have a default."""

    script_location: str
    template: str
    locations: list[str]
    branches: list[tuple[str | None, str]]  #: Branch, or none, of each location.
    sections: dict[str, dict[str, str]]  #: Of ``alembic.ini``, as ConfigParser has it.
    migration_lock: bool = True
    migration_lock_timeout: float | None = 300
    lock_timeout: float | None = None
    statement_timeout: float | None = None
    exclude_tables: cabc.Sequence[str] = []

    def is_on(self, key: str) -> bool:
        return self.sections["alembic"].get(key) == "true"


def _config_dict(app: Flask, name: str) -> dict[str, t.Any]:
    """One of our dicts in the application's configuration, made when missing."""
    options = app.config.setdefault(name, {})
    if isinstance(options, dict) and all(isinstance(key, str) for key in options):
        return options
    raise FlaskAlembicError(f"'{name}' must be a dict with str keys, not {options!r}.")


def _read_settings(app: Flask) -> _Settings:
    """Read, check and cast ``app.config["ALEMBIC"]``: the only place that does."""
    options = dict(_config_dict(app, "ALEMBIC"))
    own = {k: options.pop(k, v) for k, v in _Settings._field_defaults.items()}
    _check_settings(own, options)
    location = options.get("script_location") or "migrations"
    home = _folder(app.root_path, location, "script_location")
    # Flask-Migrate's folder is where its commands ran: beside the package.
    beside = _folder(app.root_path, "../migrations", "script_location")
    if location == "migrations" and not os.path.isdir(home):
        home = beside if _versions(beside) != beside else home
    branches: list[tuple[str | None, str]] = [(None, _versions(home))]
    sep = str(options.setdefault("path_separator", "os"))
    sep = {"os": os.pathsep, "newline": "\n", "space": " "}.get(sep, sep)
    given = options.get("version_locations"), options.get("prepend_sys_path")
    items, paths = (x.split(sep) if isinstance(x, str) else _as_list(x) for x in given)
    for item in filter(None, items):
        is_pair = isinstance(item, (list, tuple)) and len(item) == 2
        branch, path = item if is_pair else (None, item)
        branches.append((branch, _folder(app.root_path, path, "version_locations")))
    locations = list(dict.fromkeys(path for _, path in branches))
    if any(sep in path for path in locations):  # Alembic would look in two halves
        options["path_separator"], sep = "newline", "\n"
    options |= {"script_location": home, "version_locations": sep.join(locations)}
    options["prepend_sys_path"] = sep.join(map(os.fspath, paths))
    sections: dict[str, dict[str, str]] = {"alembic": {}}
    for key, value in options.items():
        pairs: t.Any = value if _is_mapping(value) else {key: value}
        section = sections.setdefault(key if pairs is value else "alembic", {})
        section |= {str(k): _cast(key, v) for k, v in pairs.items() if v is not None}
    template = os.path.join(home, "script.py.mako")
    return _Settings(home, template, locations, branches, sections, **own)


def _check_settings(own: dict[str, t.Any], others: cabc.Iterable[str]) -> None:
    """Refuse values of ours that cannot be used, and keys that look like ours."""
    for key, value in own.items():
        good, expected = isinstance(value, bool), "True or False"
        if "timeout" in key:
            good = value is None or (type(value) in (int, float) and 0 <= value < 10**9)
            expected = "a number of seconds, or None"
        elif key == "exclude_tables":  # a string would be taken for many globs
            good = isinstance(value, (list, tuple)) and {*map(type, value)} <= {str}
            expected = "a list of globs"
        if not good:
            raise _bad_value(key, value, expected)
    for key in others:
        if re.search(r"^\w*_lock|^\w*_timeout|^exclude_", key):
            raise FlaskAlembicError(f"ALEMBIC has '{key}'; ours are {_quoted(own)}.")


def _bad_value(key: str, value: t.Any, expected: str) -> FlaskAlembicError:
    return FlaskAlembicError(f"ALEMBIC['{key}'] must be {expected}, not {value!r}.")


def _cast(key: str, value: t.Any) -> str:
    """A value as ConfigParser takes it: a string whose percent signs are doubled."""
    if isinstance(value, list | tuple):
        return ", ".join(_cast(key, each) for each in value)
    if not isinstance(value, (str, int, os.PathLike)):
        raise _bad_value(key, value, "a str, int, bool, Path or list of them")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"%(?:%|(?!\(here\)s))", "%%", text)  # 'here' is ConfigParser's


def _folder(root: str, value: t.Any, key: str) -> str:
    """The absolute path of a folder, given as a path or as ``package:folder``."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise _bad_value(key, value, "a path")
    path = os.fspath(value).replace("%%", "%")  # as ConfigParser has it
    package, colon, rest = path.partition(":")
    if colon and not os.path.isabs(path) and package.replace(".", "").isidentifier():
        try:
            spec: t.Any = importlib.util.find_spec(package)
            root, path = spec.submodule_search_locations[0], rest
        except (ImportError, AttributeError, TypeError) as error:
            raise _bad_value(key, value, "a path in a package that exists") from error
    return os.path.abspath(os.path.join(root, path))


def _versions(home: str) -> str:
    """The folder of revisions: ``versions``, as in Alembic's layout, or ``home``."""
    _, folders, files = next(os.walk(home), ("", [], []))
    bare = all(x == "__init__.py" for x in files if x.endswith(".py"))
    nested = "versions" in folders and (bare or "env.py" in files)  # but never run
    return os.path.join(home, "versions") if nested else home


def _own_options(name: str) -> dict[str, t.Any]:
    """The ``configure`` options of one database: the common ones, then its own."""
    options = dict(_config_dict(current_app, "ALEMBIC_CONTEXT"))
    if _is_mapping(options.get(name)):
        options |= options.pop(name)
    options.setdefault("version_table", "alembic_version")
    # An empty schema, as from an environment variable, is none.
    options["version_table_schema"] = options.get("version_table_schema") or None
    return options


def _options(scope: _Scope, name: str) -> dict[str, t.Any]:
    """All ``configure`` options of one database, with our defaults and hooks."""
    settings, targets = scope.extension._get_cache().settings, scope.base.targets
    options: dict[str, t.Any] = {"target_metadata": targets[name].metadata}
    # SQLite can alter little in place; one file holds the revisions of all.
    options["render_as_batch"] = "sqlite" in {x.engine.name for x in targets.values()}
    if targets[name].engine.name == "sqlite":
        # It rolls DDL back when asked to. A second connection sees only commits.
        options |= {"transactional_ddl": True, "transaction_per_migration": True}
    options |= _own_options(name) | {"database": name}
    if len(targets) > 1:
        text = _read(settings.template) if name == "default" else ""
        token = "" if "bind_names" in text else name  # Flask-Migrate has no 'default'
        options |= {f"{x}_token": f"{token}_{x}s" for x in ("upgrade", "downgrade")}
    return _with_hooks(options, targets[name].engine.dialect, settings.exclude_tables)


# -- Engines and metadata --------------------------------------------------------------


class _Target(t.NamedTuple):
    """One database: its (sync side of the) engine, its metadata as given."""

    engine: sa.Engine
    metadata: MetadataOption

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells this database from others, as far as the URL says."""
        url, kind = self.engine.url, self.engine.name.replace("mariadb", "mysql")
        query, path = url.query, (url.database or "").removeprefix("file:")
        if kind == "sqlite":
            if path not in ("", ":memory:") and query.get("mode") != "memory":
                return kind, os.path.realpath(path)
        elif path or url.host or "host" in query:
            host = str(url.host or query.get("host") or "localhost").lower()
            host = "127.0.0.1" if host in ("localhost", "::1") else host
            usual = {"mysql": 3306, "postgresql": 5432}.get(kind)
            port = str(url.port or query.get("port") or usual)
            return kind, host, port, path, str(query.get("options"))
        # In memory, or an engine with a 'creator', whose URL tells nothing.
        return kind, str(id(self.engine))


def _quoted(names: cabc.Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _is_mapping(value: t.Any) -> t.TypeGuard[cabc.Mapping[str, t.Any]]:
    return isinstance(value, cabc.Mapping)


def _by_name(given: t.Any) -> dict[str, t.Any]:
    """An argument as a dict: what is no dict belongs to the ``default`` database."""
    by_name = given if _is_mapping(given) else {"default": given}
    return {name: each for name, each in by_name.items() if each is not None}


def _as_list(value: t.Any) -> list[t.Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _find_targets(extension: Alembic) -> dict[str, _Target]:
    """The databases to migrate: those that the metadata name. Arguments win."""
    db = current_app.extensions.get("sqlalchemy")
    metadatas = extension.metadatas or _by_name(getattr(db, "metadata", None))
    if not metadatas:
        raise FlaskAlembicError("No metadata found: pass 'metadatas' when setting up.")
    if not extension.metadatas and any(getattr(db, "metadatas", ())):
        _check_template(extension._get_cache().settings.template, ["default"], True)
    # A sync engine goes before an async one; Flask-SQLAlchemy may call it None.
    found = dict(getattr(db, "async_engines", None) or {})
    found |= getattr(db, "engines", None) or {}
    engines = {name or "default": found[name] for name in found} | extension.engines
    if not engines:
        raise FlaskAlembicError("There are no engines configured: pass 'engines'.")
    if missing := _quoted(metadatas.keys() - engines.keys()):
        raise FlaskAlembicError(f"Missing engine config for {missing}: pass 'engines'.")
    targets: dict[str, _Target] = {}
    seen: dict[tuple[t.Any, ...], str] = {}
    for name, metadata in metadatas.items():
        engine = getattr(engines[name], "sync_engine", engines[name])
        kinds = {isinstance(each, sa.MetaData) for each in _as_list(metadata)}
        if kinds != {True} or not isinstance(engine, sa.Engine):
            text = f"an engine and a MetaData (or a list of them), not {metadata!r}"
            raise FlaskAlembicError(f"Database '{name}' needs {text}.")
        targets[name], options = _Target(engine, metadata), _own_options(name)
        schema = options["version_table_schema"] or "public"
        place = (targets[name].identity, schema, options["version_table"])
        if (other := seen.setdefault(place, name)) != name:
            text = f"'{other}' and '{name}' share a 'version_table': rename it for one."
            raise FlaskAlembicError(text)
    return targets


def _primary(by_name: dict[str, _R]) -> _R:
    """That of the database which is meant where one answer is asked for."""
    if len(by_name) > 1 and "default" not in by_name:
        raise FlaskAlembicError(f"No 'default': name one of {_quoted(by_name)}.")
    return by_name.get("default", next(iter(by_name.values())))


# -- Environment -----------------------------------------------------------------------
# Every migration goes through _Run, one for each database: live, async, only a dialect.
# Only here are Alembic's private names touched.

_running: t.Final[ContextVar[bool]] = ContextVar("running", default=False)


@contextlib.contextmanager
def _connect(name: str, target: _Target) -> cabc.Generator[sa.Connection]:
    """A connection, given back to its pool in the end."""
    engine: t.Any = target.engine
    options, pool = engine.get_execution_options(), engine.pool
    while proxied := getattr(engine, "_proxied", None):
        engine = proxied  # SQLAlchemy 2.0 listens to no connection of one with options
    shared = isinstance(pool, (sa.StaticPool, sa.SingletonThreadPool))
    with contextlib.ExitStack() as stack:
        if isinstance(pool, sa.StaticPool):
            # Giving it back rolls back what the application has open: look first.
            _refuse_transaction(name, pool.connection.driver_connection)
        try:
            if engine.dialect.is_async and not shared:
                # Bound to its event loop, it must never reach the application's pool.
                pool = pool.recreate()
                stack.callback(pool.dispose)
                connection = sa.Connection(engine, pool.connect())
            else:
                connection = engine.connect()
        except Exception as error:
            # Without user and password, and the query, which may hold one too.
            place = ", ".join(str(x) for x in (engine.url[0], *engine.url[3:6]) if x)
            cause = " ".join(str(getattr(error, "orig", None) or error).split())
            error.add_note(f"Cannot connect to database '{name}' ({place}): {cause}")
            raise
        stack.callback(connection.close)
        connection.execution_options(**options)
        if shared:
            _refuse_transaction(name, connection.connection.driver_connection)
        yield connection


def _is_in_transaction(driver_connection: t.Any) -> bool:
    """Whether the driver has a transaction open; true where it does not tell."""
    if hasattr(driver_connection, "in_transaction"):  # sqlite3, aiosqlite
        return bool(driver_connection.in_transaction)
    if hasattr(driver_connection, "is_in_transaction"):  # asyncpg
        return bool(driver_connection.is_in_transaction())
    info = getattr(driver_connection, "info", None)  # psycopg, psycopg2
    return bool(getattr(info, "transaction_status", True))


def _refuse_transaction(name: str, driver_connection: t.Any) -> None:
    # With Python 3.12's 'autocommit=False', sqlite3 has one open at all times.
    always = getattr(driver_connection, "autocommit", True) is False
    if not always and _is_in_transaction(driver_connection):
        text = f"The application has a transaction open on database '{name}': end it."
        raise FlaskAlembicError(text)


@contextlib.contextmanager
def _reading(connection: t.Any, waits: bool = True) -> cabc.Generator[None]:
    """End the transaction that reading begins, but not one that was open before."""
    began, patience = not connection.in_transaction(), None
    # Before a run, SQLite's lock is not waited for: the guard does, as long as it may.
    if not waits and connection.dialect.name == "sqlite":
        patience = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
        connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    try:
        yield
    finally:
        if patience is not None:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")
        if began:
            connection.rollback()


def _in_loop(fn: cabc.Callable[[], _R]) -> _R:
    """Call a function where an async driver can be awaited."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    if concurrency.in_greenlet():
        return fn()
    is_running = False
    with contextlib.suppress(RuntimeError):
        is_running = asyncio.get_running_loop().is_running()

    def run() -> _R:
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(concurrency.greenlet_spawn(fn))

    if not is_running:
        return run()  # here, since not all that a revision imports bears a thread
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_context().run, run).result()


def _signature(script: ScriptDirectory) -> t.Any:
    """What changes when a revision file is added, removed or changed."""
    found: list[t.Any] = []
    for location in script._version_locations:  # noqa: SLF001  # no public name has it
        for folder, _, names in os.walk(location):
            for name in () if "__pycache__" in folder else names:  # loading fills it
                with contextlib.suppress(OSError):  # gone, or a link to nowhere
                    info = os.stat(os.path.join(folder, name))
                    found.append((folder, name, info.st_mtime_ns, info.st_size))
    return found


def _load_scripts(config: Config) -> tuple[t.Any, ScriptDirectory]:
    """Load the revision files, and refuse those that form no history."""
    from alembic.script import ScriptDirectory

    home = config.get_main_option("script_location") or ""
    if ":" not in home and not os.path.isdir(home):
        raise FlaskAlembicError(f"There is no folder '{home}': run 'flask db mkdir'.")
    script = ScriptDirectory.from_config(config)
    # Alembic tells on stdout about each file that it writes; only commands print.
    script.messaging_opts = t.cast(t.Any, {"quiet": True})
    signature = _signature(script)
    try:
        with warnings.catch_warnings():
            # Of an id that two files have, and a parent that none has, it only warns.
            warnings.filterwarnings("error", "Revision .* (is present|referenced) ")
            script.get_heads()
    except (Exception, SystemExit) as error:
        # Alembic does not tell the file, but the frame that was loading it has it.
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        paths = [f.f_locals["path"] for f in frames if f.f_code.co_name == "_from_path"]
        text = f"'{paths[-1]}' cannot be loaded" if paths else "The files do not fit"
        raise FlaskAlembicError(f"{text}: {type(error).__name__}: {error}") from error
    return signature, script


def _names(target: RevisionTarget) -> _Ids:
    """A target as Alembic's ids and symbols."""
    if isinstance(target, (list, tuple, set, frozenset)) and target:
        return tuple(name for each in target for name in _names(each))
    name = getattr(target, "revision", target)
    if isinstance(name, (str, int)) and not isinstance(name, bool) and name != "":
        return (str(name),)
    raise _command_error(f"{target!r} is no revision.")


@contextlib.contextmanager
def _explained(script: ScriptDirectory, names: _Ids) -> cabc.Generator[None]:
    """Repeat the target in what Alembic says of it, or stumbles over."""
    try:
        for branch, at, _ in (name.partition("@") for name in names):
            if at:  # Alembic takes 'nope@base' and 'nope@-1' for 'base'
                script.get_revision(branch or "@")
        yield
    except Exception as error:
        text = str(error)
        if heads := getattr(error.__cause__, "heads", ()):
            raise _several_heads(heads) from error
        if "Ambiguous" in text:
            text = "several revisions are that far away; name one"
        elif re.search("Relative revision|Walked too far", text):
            text = "there are not that many revisions"
        elif type(error).__name__ != "CommandError" and "grade" not in text:
            text = "it is no revision"  # else it may lack a function, which is named
        raise _command_error(f"'{' '.join(names)}' cannot be used: {text}.") from error


def _several_heads(heads: cabc.Iterable[str]) -> Exception:
    return _command_error(
        "There are several heads. Name one, take 'heads' for all, or merge them:"
        f' flask db merge -m "merge heads" {" ".join(sorted(heads))}'
    )


def _scripts(script: ScriptDirectory, target: RevisionTarget) -> list[Script]:
    """The revisions that a target stands for; ``base`` is none."""
    names = _names(target)
    with _explained(script, names):
        # Below base, Alembic answers with something that is no revision.
        return list({s.revision: s for s in script.get_revisions(names)}.values())


def _known(script: ScriptDirectory) -> dict[str, Script]:
    """All revisions by id, parents first."""
    return {each.revision: each for each in reversed([*script.walk_revisions()])}


def _labels(script: ScriptDirectory) -> set[str]:
    return {label for s in _known(script).values() for label in s.branch_labels}


def _below(script: ScriptDirectory, ids: cabc.Iterable[str]) -> set[str]:
    """Revisions and all that they follow or depend on."""
    return {s.revision for id_ in ids for s in script.walk_revisions("base", id_)}


def _tops(script: ScriptDirectory, applied: set[str]) -> set[str]:
    """What the version table holds when these revisions, and no others, have run."""
    found = script.get_revisions(applied)
    below = [x for s in found for x in (s.down_revision, s.dependencies) if x]
    return applied - {s.revision for x in below for s in script.get_revisions(x)}


def _stamp_line(scope: _Scope, name: str, heads: cabc.Iterable[str]) -> str:
    """The command that makes a version table hold these heads and no other."""
    only = f" -n {name}" if len(scope.base.targets) > 1 else ""
    return f"'flask db stamp --purge{only} {' '.join(sorted(heads)) or 'base'}'"


def _refuse_unknown(scope: _Scope, name: str, rows: cabc.Collection[str]) -> None:
    known = _known(scope.extension.script_directory).keys() & rows
    if unknown := {*rows} - known:
        line = _stamp_line(scope, name, ["REVISION", *known])
        raise _command_error(
            f"Database '{name}' is at {_quoted(unknown)}, which no revision file has."
            f" Get the file or, if the schema is that of a revision, run {line}."
        )


@dataclasses.dataclass
class _Job:
    """What a method asks for; called by Alembic for the steps, perhaps repeatedly."""

    extension: Alembic
    kind: t.Literal["upgrade", "downgrade", "stamp"]
    names: _Ids = ("heads",)
    start: str = "base"
    purge: bool = False

    @property
    def is_relative(self) -> bool:
        """Whether the target counts from where the database stands."""
        return bool(re.match(r".*[+-]\d+$|(.+@)?\d{1,3}$", self.names[-1]))

    def __call__(self, rows: t.Any, context: t.Any) -> list[t.Any]:
        """The steps from the ids in a version table."""
        # Read when the lock is held: the files may have changed while we waited.
        script = context.script = self.extension.script_directory
        name = context.opts.get("database", "default")  # a subclass may not have said
        _refuse_unknown(self.extension._scope(), name, rows)
        if self.kind == "stamp":
            return self._stamp_steps(script, {*rows})
        [target, *more], down = self.names, self.kind == "downgrade"
        # Digits are an id before they are a count; nobody counts to a thousand.
        if target.isdecimal() and len(target) < 4 and target not in _known(script):
            target = f"{'-' if down else '+'}{int(target)}"
        if down and target.startswith("-") and len({*rows}) > 1:
            found = _scripts(script, rows)
            labels = {min(s.branch_labels, default=s.revision) for s in found}
            ids = labels if len(labels) == len(found) else rows
            choice = _quoted(f"{id_}@{target}" for id_ in ids)
            raise _command_error(f"'{target}' is ambiguous: name one of {choice}.")
        with _explained(script, (target, *more)):
            # Alembic's commands make theirs so; no public function does.
            make = getattr(script, f"_{self.kind}_revs")
            return list(make((target, *more) if more else target, tuple(rows)))

    def _stamp_steps(self, script: t.Any, rows: set[str]) -> list[t.Any]:
        """Steps to exactly the rows that are asked for; Alembic's own lose a branch."""
        from alembic.runtime.migration import StampStep

        applied, named, history = _below(script, rows), set[str](), script.revision_map
        for name in self.names:
            if re.match(r"(.+@)?[+-]\d", name):
                raise _command_error(f"'{name}' is relative: name a revision.")
            found = {each.revision for each in _scripts(script, name)}
            if not found:  # 'base' or 'branch@base'
                applied.difference_update(history.filter_for_lineage(applied, name))
            named |= found
        above = {*named}
        for id_, each in _known(script).items():
            if above.intersection(_as_list(each.down_revision)):
                above.add(id_)
        wanted = _tops(script, applied - above | _below(script, named))
        # A script that removes the last row first would make the table again.
        new, old = sorted(wanted - rows), sorted(rows - wanted)
        steps = [StampStep(None, id_, True, True, history) for id_ in new]
        return steps + [StampStep(id_, None, False, True, history) for id_ in old]


def _rows(scope: _Scope, waits: bool = True) -> dict[str, _Ids]:
    rows = {}
    for name, context in scope.extension.migration_contexts.items():
        with _reading(context.connection, waits):
            rows[name] = context.get_current_heads()
    return rows


def _status(scope: _Scope) -> dict[str, DatabaseStatus]:
    script, result = scope.extension.script_directory, {}
    heads, known = script.get_revisions("heads"), _known(script)
    job, live = _Job(scope.extension, "upgrade"), scope.extension.migration_contexts
    for name, rows in _rows(scope).items():
        unknown = tuple(id_ for id_ in rows if id_ not in known)
        current = tuple(known[id_] for id_ in sorted(rows) if id_ in known)
        pending = () if unknown else tuple(s.revision for s in job(rows, live[name]))
        result[name] = DatabaseStatus(current, heads, pending, unknown)
    return result


def _has_work(scope: _Scope, job: _Job, waits: bool = True) -> bool:
    """Whether one has something to do; all are asked, and nothing is written."""
    rows, contexts = _rows(scope, waits), scope.extension.migration_contexts
    return job.purge or any([job(ids, contexts[name]) for name, ids in rows.items()])  # noqa: C419


class _Run:
    """One run on one database; without a connection, it writes SQL to ``output``."""

    step: RevisionStep | None = None  # that is running, or that failed
    _partial: t.Any = (None, None)  # the step that committed by itself, and from where
    hold: cabc.Callable[[], object] = bool  # SQLite's: see that the lock is ours

    def __init__(
        self, scope: _Scope, name: str, fn: StepFunction, connection: t.Any, rows: _Ids
    ) -> None:
        from alembic.runtime.environment import EnvironmentContext

        self.scope, self.name, self.fn, self.connection = scope, name, fn, connection
        self.output, self.title = io.StringIO(), ""
        self.heads: set[str] = set()  # the version table, as far as the run has come
        options, given = _options(scope, name), dict[str, t.Any](fn=self._steps)
        if isinstance(fn, _Job):
            given.update(purge=fn.purge, destination_rev=" ".join(fn.names))
            if fn.kind == "stamp":
                options["transaction_per_migration"] = False
        if connection is None:
            # Other parameter styles would double the percent signs in the script.
            dialect_opts = {"paramstyle": "named", **options.get("dialect_opts", {})}
            url = scope.targets[name].engine.url
            options.update(url=url, dialect_opts=dialect_opts, literal_binds=True)
            given.update(as_sql=True, starting_rev=rows, output_buffer=self.output)
        script, given["tag"] = scope.extension.script_directory, scope.tag
        self.environment = EnvironmentContext(scope.config, script, **given)
        self.environment.configure(connection=connection, **options)
        self.context = t.cast(t.Any, self.environment.get_context())
        if connection is None and self.context.dialect.name == "postgresql":
            # SQLAlchemy 2.0 doubles backslashes until it has seen a server's setting.
            self.context.dialect._backslash_escapes = False  # noqa: SLF001
        self.context.on_version_apply_callbacks += (self._applied,)

    def _steps(self, rows: t.Any, context: MigrationContext) -> cabc.Iterator[t.Any]:
        """The steps, reporting each when it is in the version table."""
        self.heads = {*rows}
        steps: list[t.Any] = list(self.fn(rows, context))
        for number, step in enumerate(steps, 1):
            if (script := getattr(step, "revision", None)) is None:  # a stamp
                yield step
                continue
            run = functools.partial(self._execute, step, step.migration_fn)
            step.migration_fn = functools.update_wrapper(run, step.migration_fn)
            self.title = f"Revision '{script.revision}' ('{script.path}')"
            self.step, began = step, time.monotonic()
            yield step
            self.step, self.scope.ran[script.revision] = None, script
            if report := g.get("flask_alembic_report"):
                report(self.name, script, number, len(steps), time.monotonic() - began)

    def _execute(self, step: RevisionStep, fn: t.Any, /, **kwargs: t.Any) -> None:
        """Call the function of a revision, and see what it does to the transaction."""
        self.hold()
        if (arguments := self._arguments(step, fn)) is None:
            return
        if inspect.iscoroutinefunction(fn):
            raise TypeError(f"{self.title} has an async function, which cannot run.")
        watches = self.connection is not None and self.context.impl.transactional_ddl
        events = ("commit", "after_cursor_execute") if watches else ()
        with _listening(self.connection, **dict.fromkeys(events, self.look)):
            try:
                fn(**kwargs, **arguments)
            except BaseException as error:
                if self.connection is None:
                    error.add_note(f"{self.title} failed as SQL, without a connection.")
                # A statement that fails, as on a full disk, may roll back by itself.
                elif self.hold is not bool and not isinstance(error, exc.DBAPIError):
                    self.look(self.connection, error)
                raise
        # What Alembic opened: for the run, for the step, after an autocommit_block().
        transaction = self.context._transaction  # noqa: SLF001
        if transaction is not None and not transaction.is_active:
            raise FlaskAlembicError(
                f"{self.title} ended the migration's own transaction, by a 'commit()'"
                " or 'rollback()': use 'op.get_context().autocommit_block()' instead."
            )
        self.hold()

    def _arguments(self, step: t.Any, fn: t.Any) -> dict[str, str] | None:
        """What to pass to a revision's function; ``None`` not to call it."""
        module, parameters = step.revision.module, inspect.signature(fn).parameters
        prefix = "upgrade_" if step.is_upgrade else "downgrade_"
        found = {x.removeprefix(prefix) for x in vars(module) if x.startswith(prefix)}
        name, names = self.name, {*self.scope.base.targets}
        # What the file has tells it where a decorator has hidden the parameters.
        is_hidden = any(x.kind is x.VAR_KEYWORD for x in parameters.values())
        if "engine_name" in parameters or (is_hidden and found & {*names, ""}):
            if name == "default" and "" in found:  # as Flask-Migrate names it
                name = ""
            if not found or name in found:
                return {"engine_name": name}
            if found - {""} <= names:  # written before this database existed
                return None
        elif len(names) == 1 or name == "default":
            return {}
        elif "default" in names:  # written before there was a second database
            return None
        text = f"{self.title} has no function for database '{name}'. Was it renamed?"
        raise _command_error(text)

    def _applied(self, *, heads: cabc.Iterable[str], **_: t.Any) -> None:
        self.heads = {*heads}

    def look(self, connection: t.Any, *statement: t.Any) -> None:
        """See a commit: an autocommit block's, or one that only the driver knows."""
        if statement and (connection.invalidated or _is_autocommit(connection)):
            return
        if not (
            statement and _is_in_transaction(connection.connection.driver_connection)
        ):
            self._partial = self.step, self.heads

    def outcome(self) -> str:
        """Where the database stands after a failure, and what to do about it."""
        [step, heads], rows = self._partial, set[str]()
        what = "what had not been committed was rolled back"
        if not self.context.impl.transactional_ddl:
            what = "each DDL statement that finished stays, rows changed since do not"
            step, heads = self.step, self.heads
        where = "where it stands cannot be read now: see 'flask db status'"
        with contextlib.suppress(Exception), _reading(self.connection):
            rows = {*self.context.get_current_heads()}
            where = f"it stands at {_quoted(rows) or 'base'}"
        if step and heads == rows:  # else what it did was rolled back, or is recorded
            script, id_ = self.scope.extension.script_directory, step.revision.revision
            applied = _below(script, rows) - {id_}
            heads = _tops(script, applied | {id_} if step.is_upgrade else applied)
            where += f". Undo by hand what '{id_}' did, and run the command again; or"
            where += f" finish it and run {_stamp_line(self.scope, self.name, heads)}"
        failed = f"{self.title} failed.\n" if self.step else ""
        return f"{failed}Database '{self.name}': {what}; {where}."


def _run_online(scope: _Scope, fn: StepFunction, kwargs: dict[str, t.Any]) -> None:
    """Run steps on a scope's databases: on all or none, as far as they allow."""
    contexts: dict[str, t.Any] = scope.extension.migration_contexts
    settings = scope.extension._get_cache().settings
    job = fn if isinstance(fn, _Job) else None
    repeats = job and not job.is_relative
    scope.ran.clear()
    while True:
        with contextlib.suppress(exc.OperationalError):  # SQLite's guard may wait
            if job and not _has_work(scope, job, waits=False):
                return
        runs: dict[str, _Run] = {}
        try:
            with _turn(scope), contextlib.ExitStack() as stack:
                # All locks first, in the same order whatever the databases are called.
                for name in sorted(contexts, key=lambda x: scope.targets[x].identity):
                    # Alembic would neither begin nor commit in what a caller has open.
                    contexts[name].connection.commit()
                    runs[name] = _Run(scope, name, fn, contexts[name].connection, ())
                    stack.enter_context(_guard(runs[name], settings))
                for run in runs.values():
                    stack.enter_context(run.environment.begin_transaction())
                for name in contexts:
                    with runs[name].environment as environment:
                        environment.run_migrations(**kwargs)
            return
        except BaseException as error:
            if repeats and isinstance(error, _OvertakenError):
                continue
            if scope.ran or any(run.step for run in runs.values()):
                error.add_note("\n".join(run.outcome() for run in runs.values()))
            raise


@contextlib.contextmanager
def _turn(scope: _Scope) -> cabc.Generator[None]:
    """Have Alembic's ``op`` and ``context``, which are the process's, for one run."""
    timeout = scope.extension._get_cache().settings.migration_lock_timeout
    if _running.get() or _process_lock("run")._is_owned():  # noqa: SLF001  # by a task
        raise FlaskAlembicError("A migration that runs cannot start another.")
    if not _process_lock("run").acquire(timeout=-1 if timeout is None else timeout):
        raise MigrationLockTimeout(", ".join(scope.targets), timeout or 0)
    token = _running.set(True)
    try:
        yield
    finally:
        _running.reset(token)
        _process_lock("run").release()


def _run_offline(scope: _Scope, job: _Job) -> dict[str, str]:
    """Write the steps as SQL, from where the databases stand or from a given start."""
    script, result = scope.extension.script_directory, {}
    rows = _rows(scope) if (live := job.start == "current") else {}
    start = () if live else tuple(s.revision for s in _scripts(script, job.start))
    if job.kind == "upgrade" and not live and not job.is_relative:
        target = [each.revision for each in _scripts(script, job.names)]
        if {*start} - _below(script, target):
            raise _command_error(f"'{job.start}:{' '.join(job.names)}' leads nowhere.")
    for name in scope.targets:
        run = _Run(scope, name, job, None, rows.get(name, start))
        with _turn(scope), run.environment.begin_transaction(), run.environment:
            run.environment.run_migrations()
        result[name] = run.output.getvalue()
    return result


# -- Guards ----------------------------------------------------------------------------
# Around a run on a database: its lock, SQLite's transaction, the server's time limits.


def _guard(run: _Run, settings: _Settings) -> contextlib.AbstractContextManager[t.Any]:
    """None for other servers, or where SQLite is to work as with Alembic alone."""
    kind = run.connection.dialect.name
    if kind in ("postgresql", "mysql", "mariadb"):
        return _server_guard(run, settings)
    if kind == "sqlite" and run.context.impl.transactional_ddl:
        return _SqliteGuard(run, settings).guard()
    return contextlib.nullcontext()


def _is_autocommit(connection: t.Any) -> bool:
    return "AUTOCOMMIT" in connection.get_execution_options().values()


def _listening(connection: t.Any, **listeners: t.Any) -> contextlib.ExitStack:
    """Listen to a connection's events; one of them may replace what it is given."""
    stack = contextlib.ExitStack()
    for name, listener in listeners.items():
        event.listen(connection, name, listener, retval=name == "before_cursor_execute")
        stack.callback(event.remove, connection, name, listener)
    return stack


def _wait(name: str, timeout: float | None, attempt: cabc.Callable[[], bool]) -> None:
    """Try for a lock until it is ours."""
    limit = float("inf") if timeout is None else timeout
    began, pause, telling = time.monotonic(), 0.02, 1.0
    while not attempt():
        waited = time.monotonic() - began
        if waited >= limit:
            raise MigrationLockTimeout(name, waited)
        if waited >= telling:
            telling *= 2
            _logger.info("Waiting for the lock to migrate '%s' (%.0f s).", name, waited)
        # Polled: a concurrent index build waits for all statements that are open.
        time.sleep(min(pause, limit - waited))
        pause = min(pause * 1.5, 0.5)


@contextlib.contextmanager
def _server_guard(run: _Run, settings: _Settings) -> cabc.Generator[None]:
    """The lock and the limits of PostgreSQL, MySQL and MariaDB."""
    connection, is_mysql = run.connection, run.connection.dialect.name != "postgresql"
    autocommit = getattr(connection.connection.dbapi_connection, "autocommit", False)
    if is_mysql:
        autocommit = connection.exec_driver_sql("SELECT @@autocommit").scalar() == 1
        connection.rollback()
    if autocommit:  # it has no transaction that could be rolled back
        connection.execution_options(isolation_level=connection.default_isolation_level)
    # Of PostgreSQL's transaction: a pooler would pass a session's on. 0 is no limit.
    lock, statement = "LOCAL lock_timeout = '{}s'", "LOCAL statement_timeout = '{}s'"
    if is_mysql:  # they limit sessions only; MySQL, its SELECT statements only
        lock = "lock_wait_timeout = CEILING({0}),"
        lock += " innodb_lock_wait_timeout = CEILING({0})"
        is_mariadb, statement = connection.dialect.is_mariadb, "max_statement_time = {}"
        statement = statement if is_mariadb else "max_execution_time = CEILING({}*1000)"
    pairs = (lock, settings.lock_timeout), (statement, settings.statement_timeout)
    limits = [f"SET {x}".format(max(s, 0.001)) for x, s in pairs if s is not None]

    def limit(_: t.Any) -> None:
        for text in limits:  # LOCAL is nothing in autocommit, as for a concurrent index
            connection.exec_driver_sql(text)

    with contextlib.ExitStack() as stack:
        if settings.migration_lock:
            stack.enter_context(_server_lock(run, settings.migration_lock_timeout))
        if autocommit or (is_mysql and limits):  # the pool makes a new session
            stack.callback(connection.invalidate)
        with _listening(connection, begin=limit):
            yield


@contextlib.contextmanager
def _server_lock(run: _Run, timeout: float | None) -> cabc.Generator[None]:
    """Hold the server's lock, at session level: a transaction would lose it."""
    connection, context, taken = run.connection, run.context, False
    schema = context.version_table_schema or connection.dialect.default_schema_name
    place = f"flask_alembic:{schema or ''}.{context.version_table}"
    key: t.Any = sa.func.hashtextextended(place, 0)
    take, release = sa.func.pg_try_advisory_lock(key), sa.func.pg_advisory_unlock(key)
    if connection.dialect.name != "postgresql":
        key = sa.func.sha1(place)
        take, release = sa.func.get_lock(key, 0), sa.func.release_lock(key)

    def ask(function: t.Any) -> bool:
        with _reading(connection):
            return bool(connection.scalar(function))

    try:
        _wait(run.name, timeout, lambda: ask(take))
        taken = True
        yield
    finally:
        try:
            connection.rollback()
            # Not taken, it may be ours: an interrupt can come just after the lock.
            if not connection.invalidated and not ask(release) and taken:
                text = "Lock of '%s' lost: 'migration_lock' must be off for a pooler."
                _logger.warning(text, run.name)
        except exc.DBAPIError:
            connection.invalidate()  # a session that is locked must not reach the pool


class _SqliteGuard:
    """Makes SQLite's transaction cover DDL; its ``BEGIN IMMEDIATE`` is the lock."""

    def __init__(self, run: _Run, settings: _Settings) -> None:
        self._run, self._settings, self._connection = run, settings, run.connection
        self._driver: t.Any = self._connection.connection.dbapi_connection
        self._cursor = self._driver.cursor()
        self._enforced = self._pragma("foreign_keys")
        self._orphans: t.Counter[str] | None = None
        self._was_free = False  # others could have the lock since the heads were read

    @contextlib.contextmanager
    def guard(self) -> cabc.Generator[None]:
        connection, driver = self._connection, self._driver
        _refuse_transaction(self._run.name, connection.connection.driver_connection)
        level, mode = driver.isolation_level, getattr(driver, "autocommit", -1)
        if mode != -1:  # Python 3.12's own control: it knows no BEGIN IMMEDIATE
            driver.autocommit = -1
            driver.rollback()
        if _is_autocommit(connection):
            connection.execution_options(isolation_level="SERIALIZABLE")
        # A batch operation drops the original table, which would delete its children.
        self._pragma("foreign_keys = 0")
        self._run.hold = self._hold
        events = {"begin": self._begin, "commit": self._commit}
        try:
            with _listening(connection, before_cursor_execute=self._before, **events):
                yield
        finally:
            connection.rollback()
            if not connection.invalidated:  # as it is by Ctrl-C inside a statement
                driver.rollback()
                self._pragma(f"foreign_keys = {self._enforced}")
                if mode != -1:
                    driver.autocommit = mode
                driver.isolation_level = level
                self._cursor.close()

    def _hold(self) -> None:
        """Take the lock again where a revision gave it up; see who had it since."""
        self._begin()
        was_free, self._was_free = self._was_free, False
        if was_free and self._run.heads != {*self._run.context.get_current_heads()}:
            text = f"Another process migrated '{self._run.name}' meanwhile: run again."
            raise _OvertakenError(text)

    def _begin(self, _: t.Any = None) -> None:
        """Take the lock, where it is not ours yet."""
        driver = self._connection.connection.driver_connection
        if _is_autocommit(self._connection) or _is_in_transaction(driver):
            return
        self._driver.isolation_level = None  # an autocommit_block() gave it back
        patience = self._pragma("busy_timeout")
        self._pragma("busy_timeout = 0")
        try:
            _wait(self._run.name, self._settings.migration_lock_timeout, self._attempt)
        finally:
            self._pragma(f"busy_timeout = {patience}")
        self._was_free = True
        if self._enforced and self._orphans is None:
            self._orphans = self._count_orphans()

    def _attempt(self) -> bool:
        try:
            lock = " IMMEDIATE" if self._settings.migration_lock else ""
            self._cursor.execute(f"BEGIN{lock}")
            return True
        except Exception as error:
            if "locked" in str(error):
                return False
            raise

    def _before(self, *args: t.Any) -> tuple[str, t.Any]:
        self._run.look(*args)
        # SQLAlchemy's recipe for SQLite has a listener of the engine emit BEGIN.
        begins = args[2].lstrip()[:5].upper() == "BEGIN"
        return ("SELECT 1" if begins else args[2]), args[3]

    def _commit(self, _: t.Any) -> None:
        """Refuse a transaction that adds rows which refer to nothing."""
        before, self._orphans = self._orphans, None
        if before is None:
            return
        now = self._count_orphans()
        renamed = sum(before[table] for table in before.keys() - now.keys())
        if (added := now - before).total() > renamed:
            text = f"Refused to orphan rows of {_quoted(added)} in '{self._run.name}'."
            raise FlaskAlembicError(text)

    def _pragma(self, text: str) -> t.Any:
        self._cursor.execute(f"PRAGMA {text}")
        return (self._cursor.fetchone() or [None])[0]

    def _count_orphans(self) -> t.Counter[str]:
        """How many rows of each table refer to nothing."""
        found, cursor = t.Counter[str](), self._cursor
        cursor.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for row in cursor.fetchall():
            # It fails where a key of the table refers to columns that are not unique.
            with contextlib.suppress(self._connection.dialect.dbapi.OperationalError):
                cursor.execute("SELECT count(*) FROM pragma_foreign_key_check(?)", row)
                found[row[0]] = cursor.fetchone()[0]
        return found


# -- Autogenerate ----------------------------------------------------------------------


@contextlib.contextmanager
def _writing(place: t.Any) -> cabc.Generator[None]:
    try:
        yield
    except OSError as error:
        raise FlaskAlembicError(f"Cannot write to '{place}': {error}.") from error


def _read(path: str) -> str:
    """The text of a file, however a version control system has ended the lines."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        return file.read()
    return ""


def _place_template(template: str, names: cabc.Collection[str]) -> None:
    """Copy the template that is needed, over nothing or Alembic's unchanged other."""
    spec: t.Any = importlib.util.find_spec("alembic")  # without importing it
    folder, several = f"{os.path.dirname(spec.origin)}/templates", len(names) > 1
    generic, multidb = (f"{folder}/{x}/script.py.mako" for x in ("generic", "multidb"))
    if not os.path.isfile(template) or (several and _read(template) == _read(generic)):
        shutil.copyfile(multidb if several else generic, template)


def _check_template(template: str, names: cabc.Collection[str], empty: bool) -> None:
    """Refuse a template that would write a file without its operations."""
    text, several = _read(template), len(names) > 1
    # What Alembic's templates, and those that follow them, render operations by.
    for_several, for_one = "_upgrades" in text, re.search(r"\bupgrades\b", text)
    if several and (bad := [name for name in names if not name.isidentifier()]):
        raise FlaskAlembicError(f"{_quoted(bad)} cannot be in the name of a function.")
    if for_several if several else for_one or (empty and not for_several):
        return
    error = f"'{template}' is not for {_quoted(names)}: rename it, run 'flask db mkdir'"
    db = current_app.extensions.get("sqlalchemy")
    if for_several and (binds := [x for x in getattr(db, "metadatas", ()) if x]):
        more = "".join(f', "{name}": db.metadatas["{name}"]' for name in binds)
        error += f', or write Alembic(metadatas={{"default": db.metadata{more}}})'
    raise FlaskAlembicError(f"{error}.")


def _place(extension: Alembic, branch: str, asked: dict[str, t.Any]) -> None:
    """Check what :meth:`Alembic.revision` was asked for, and say it as Alembic does."""
    script, settings = extension.script_directory, extension._get_cache().settings
    known, named, folders = _known(script), _labels(script), dict(settings.branches)
    labels, parents = _as_list(asked["branch_label"]), _names(asked["head"])
    if parents != ("head",):
        labels += [branch] if branch not in {*named, "default"} else []
    elif branch in named:
        parents = (f"{branch}@head",)
    else:
        # A history from elsewhere has no labels: its head is the default branch's.
        heads = script.get_revisions(script.get_heads())
        parents = tuple(s.revision for s in heads if not s.branch_labels)
        if branch == "default" and not parents and (others := named - folders.keys()):
            text = f"Continue {_quoted(others)} by '-b', or begin anew by '-p base'."
            raise _command_error(text)
        if branch != "default" or not parents:
            parents, labels = ("base",), [*labels, branch]
        elif len(parents) > 1:
            raise _several_heads(parents)
    new, path, depend = asked["rev_id"], asked["version_path"], asked["depends_on"]
    if new is None:
        new = str(extension.rev_id())
        while new.isdecimal() and new in known:
            new = str(int(new) + 1).zfill(len(new))
    taken = {*known, *named, "base", "head", "heads", "current"}
    forms = dict.fromkeys(labels, r"[^\s@:+]+") | {new: r"\w[\w.]{0,31}"}  # at most 32
    for name, form in forms.items():
        if name in taken or new in labels or not re.fullmatch(form, name):
            raise _command_error(f"'{name}' is taken, or can be no id or branch.")
    depends = [] if depend is None else [*_names(depend)]
    if not all(_scripts(script, each) for each in depends):
        raise _command_error(f"{_quoted(depends)} cannot be depended on.")
    folder = folders.get(branch, settings.locations[0])
    if path is not None:
        folder = folders.get(str(path)) or _folder(current_app.root_path, path, "path")
    asked |= {"rev_id": new, "depends_on": depends or None, "version_path": folder}
    asked["head"] = [each.revision for each in _scripts(script, parents)] or "base"
    asked["branch_label"] = list(dict.fromkeys(labels)) or None


def _generate(scope: _Scope, script: ScriptDirectory, arguments: t.Any) -> list[Script]:
    """Write revision files: Alembic's own way, without its printing."""
    from alembic.autogenerate import RevisionContext

    extension, compares = scope.extension, arguments["autogenerate"]
    # The template asks for the names; a subclass may have made the configuration.
    names = ", ".join(extension.metadatas or ["default"])
    scope.config.set_main_option("databases", names)
    # The message starts a docstring, and never becomes code.
    text = arguments["message"].replace("\\", r"\\").replace('"', r"\"")
    text = "".join(x if x.isprintable() or x == "\n" else ascii(x)[1:-1] for x in text)
    revisions = RevisionContext(scope.config, script, arguments | {"message": text})
    # Not 'get_heads()': a head that another branch depends on has no row.
    heads = tuple(each.revision for each in script.get_revisions("heads"))
    run = revisions.run_autogenerate if compares else revisions.run_no_autogenerate
    if compares or extension._get_cache().settings.is_on("revision_environment"):
        for name, context in extension.migration_contexts.items():
            revisions.template_args.update(_own_options(name).get("template_args", {}))
            with _comparing(context):
                if compares:
                    _refuse_comparison(scope, name, context)
                run(heads, context)
    made = revisions.generated_revisions
    if compares:
        made[:] = [s for s in made if any(x.ops for x in s.upgrade_ops_list)]
    # Of its post-write hooks, Alembic tells on stdout.
    with _writing(arguments["version_path"]), contextlib.redirect_stdout(sys.stderr):
        return [each for each in revisions.generate_scripts() if each is not None]


@contextlib.contextmanager
def _comparing(context: t.Any) -> cabc.Generator[None]:
    """Let the user's hooks find ``alembic.context``, as in a run of migrations."""
    # Inside a revision, the run's own environment is there, and must stay.
    own = contextlib.nullcontext() if _running.get() else context.environment_context
    with _process_lock("run"), _reading(context.connection), own:
        yield


def _refuse_comparison(scope: _Scope, name: str, context: MigrationContext) -> None:
    """Refuse a database that is behind, or models that seem not to be imported."""
    from alembic.autogenerate.api import AutogenContext

    if steps := _Job(scope.extension, "upgrade")(context.get_current_heads(), context):
        text = f"Database '{name}' is {_count(steps)} behind: run 'flask db upgrade'."
        raise _command_error(text)
    compared: t.Any = AutogenContext(context)
    found, where = compared.inspector.get_table_names(), {"schema_name": None}
    tables = [x for x in found if compared.run_name_filters(x, "table", where)]
    if tables and not any(each.tables for each in _as_list(compared.metadata)):
        raise FlaskAlembicError(
            f"The metadata of database '{name}' has no table, but the database has"
            f" {_quoted(tables)}: import the models, or drop them by --empty."
        )


def _produce(scope: _Scope) -> MigrationScript:
    from alembic.autogenerate import produce_migrations
    from alembic.operations.ops import MigrationScript

    made = MigrationScript(None, t.cast(t.Any, []), t.cast(t.Any, []))
    for context in scope.extension.migration_contexts.values():
        with _comparing(context):
            script = produce_migrations(context, context.opts["target_metadata"])
        made.upgrade_ops_list.extend(script.upgrade_ops_list)
        made.downgrade_ops_list.extend(script.downgrade_ops_list)
    return made


def _with_hooks(
    options: dict[str, t.Any], dialect: sa.Dialect, exclude: cabc.Sequence[str]
) -> dict[str, t.Any]:
    """Options of ``configure`` with our hooks; the user's callables answer first."""
    globs = ["*alembic_version*", options["version_table"], *exclude]

    def ask(hook: str, default: t.Any, *args: t.Any) -> t.Any:
        user = options.get(hook)
        return user(*args) if callable(user) else default

    def is_ours(name: str, schema: str | None) -> bool:
        """Whether no glob matches the name or, with a dot in it, schema and name."""
        full = f"{schema or dialect.default_schema_name}.{name}"
        return not any(fnmatchcase(full if "." in x else name, x) for x in globs)

    def include_name(name: t.Any, type_: str, parents: t.Any) -> bool:
        wanted = ask("include_name", True, name, type_, parents)
        return wanted and (type_ != "table" or is_ours(name, parents["schema_name"]))

    def include_object(item: t.Any, name: t.Any, type_: str, *args: t.Any) -> bool:
        if type(getattr(args[1], "server_default", None)) in (sa.Computed, sa.Identity):
            # Alembic 1.18 and later take its text before they ask a callable.
            args[1].server_default.arg = sa.text("")
        wanted = ask("include_object", True, item, name, type_, *args)
        table = item if type_ == "table" else getattr(item, "table", None)
        return wanted and (table is None or is_ours(table.name, table.schema))

    def render_item(type_: str, item: t.Any, context: t.Any) -> t.Any:
        code = ask("render_item", False, type_, item, context)
        module = type(item).__module__
        if code is False and type_ == "type" and not module.startswith("sqlalchemy."):
            context.imports.add(f"import {module}")
        return code

    def compare_server_default(*args: t.Any) -> t.Any:
        answer = ask("compare_server_default", None, *args)
        return _is_default_changed(*args[:3]) if answer is None else answer

    hooks: list[t.Any] = [include_name, include_object]
    hooks += [render_item] if options.get("user_module_prefix") is None else []
    hooks += [compare_server_default] if options.get("compare_server_default") else []
    return options | {hook.__name__: hook for hook in hooks}


def _is_default_changed(context: t.Any, found: t.Any, wanted: t.Any) -> bool | None:
    """Compare the texts of two server defaults; ``None`` where Alembic is to decide."""
    both, dialect = (found.server_default, wanted.server_default), context.dialect
    if not all(isinstance(each, sa.DefaultClause) for each in both):
        return None
    text = dialect.ddl_compiler(dialect, None).get_column_default_string(wanted)
    if dialect.paramstyle in ("format", "pyformat"):
        text = text.replace("%%", "%")
    old, new = (_normal(each, wanted.type) for each in (both[0].arg.text, text))
    # Literals that differ are a change, but for types that PostgreSQL writes anew.
    kinds = "ARRAY|BIT|BOOL|BYTEA|CIDR|INET|INTERVAL|JSONB|MAC|MONEY|RANGE|TSV|TSQ|UUID"
    is_own = re.search(kinds, found.type.__visit_name__) and "'" not in new[1]
    is_certain = old == new or (old[0] == new[0] == "literal" and not is_own)
    return old != new if is_certain else None


def _normal(sql: str, type_: t.Any) -> tuple[str, str]:
    """A default without what a server adds: casts, parentheses, a number's quotes."""
    cast, before = r"""^('(?:[^']|'')*'|[\w.+-]+)::[\w ."]+(\[\])*$""", ""
    while sql != before:
        before, sql = sql, re.sub(cast, r"\1", sql.strip())
        sql = re.sub(r"^\(((?:[^()]|\([^()]*\))*)\)$", r"\1", sql)
    quoted = re.fullmatch(r"'((?:[^']|'')*)'", sql)
    text = quoted[1].replace("''", "'") if quoted else sql
    with contextlib.suppress(Exception):
        kind = type_.python_type
        if issubclass(kind, int | float | decimal.Decimal):
            text = {"true": "1", "false": "0"}.get(text.lower(), text)
            return "literal", str(decimal.Decimal(text).normalize())
        if quoted and hasattr(kind, "fromisoformat"):
            return "date", kind.fromisoformat(text).isoformat()
    if not quoted and "'" not in text and '"' not in text:
        text = re.sub(r"(now|current_timestamp)\(\)", "current_timestamp", text.lower())
    return "literal" if quoted else "", text


# -- Quick look ------------------------------------------------------------------------
# Most starts have nothing to upgrade, and the text of the revision files says so,
# without importing Alembic or running a file. In any doubt, Alembic is asked.

_STRING: t.Final = r"""(?:"[^"\\\n]*"|'[^'\\\n]*')"""
#: An assignment at the left margin of a plain value on one line.
_ASSIGNMENT: t.Final = (
    r"(?m)^(revision|down_revision|branch_labels|depends_on)[ \t]*(?::[^=\n]*)?=[ \t]*"
    rf"(None|{_STRING}|[(\[][ \t]*(?:{_STRING}[ \t]*(?:,[ \t]*{_STRING}[ \t]*)*,?)?"
    r"[ \t]*[)\]])[ \t]*(?:\#.*)?$"
)
#: What else could bind one of the names, or hide what does; first, where one may start.
_DOUBT: t.Final = (
    r"(?=[a-z_\f\uff00-\uffef])(?:\b(?:(?:down_revision|branch_labels|depends_on)\b"
    r"|revision[ \t]*(?:[,)\]]|(?::[^=\n]*|[-+*/|&%@^<>]+)?=(?!=))"
    r"|(?:for|as|def|class|del|import|global)\b.*\brevision\b"
    r"|(?:exec|eval|globals|locals|vars|setattr|delattr|f_globals|__\w+attr__)\b"
    r"|__dict__\b|import[ \t]*\*)|coding[:=][ \t]*(?!utf-?8)|\f|[\uff00-\uffef])"
)


def _is_current(scope: _Scope, job: _Job, waits: bool = True) -> bool:
    """Whether surely nothing is to run; an import that would fail goes unseen."""
    settings = scope.extension._get_cache().settings
    odd = settings.is_on("sourceless") or settings.is_on("recursive_version_locations")
    # A subclass may see to it that other files or tables are looked at.
    asked = (type(scope.extension), job.kind, job.names)
    if odd or asked != (Alembic, "upgrade", ("heads",)):
        return False
    found: set[frozenset[str]] = set()
    for name in scope.targets:
        connection, options = scope.connect(name), _own_options(name)
        if connection.in_transaction():
            return False  # a query that fails would end the caller's transaction
        schema = options["version_table_schema"]
        column = sa.column("version_num", sa.String())
        table = sa.table(options["version_table"], column, schema=schema)
        try:
            with _reading(connection, waits):
                found.add(frozenset(connection.scalars(sa.select(table))))
        except exc.DBAPIError:
            return False
    # The files cost most, so they are read last.
    return len(found) == 1 and all(found) and _quick_heads(settings.locations) in found


def _quick_heads(locations: cabc.Sequence[str]) -> frozenset[str] | None:
    """The version table's rows when all is done; ``None``: Alembic must be asked."""
    import graphlib

    below: dict[str, list[str]] = {}
    names = ["", "base", "head", "heads"]  # not for ids: three are targets
    # Compiled here, since most processes never come to it.
    assignment, doubt = re.compile(_ASSIGNMENT), re.compile(_DOUBT)
    try:
        for entry in [e for x in locations if os.path.exists(x) for e in os.scandir(x)]:
            if entry.is_symlink():
                return None  # Alembic goes by the name that it leads to
            if entry.is_dir() or not re.match(r"(?!\.#|__init__).*\.py$", entry.name):
                continue
            text = _read(entry.path)
            matches = assignment.findall(text)
            found = {x: [s[1:-1] for s in re.findall(_STRING, v)] for x, v in matches}
            if len(found) < len(matches) or doubt.search(assignment.sub("", text)):
                return None
            [id_] = found["revision"]
            below[id_] = found["down_revision"] + found.get("depends_on", [])
            names += [id_, *found.get("branch_labels", [])]
        graphlib.TopologicalSorter(below).prepare()  # fails if there is a loop
    except (OSError, ValueError, LookupError):  # whatever it is, Alembic says it better
        return None
    covered = {id_ for ids in below.values() for id_ in ids}
    # A name is there twice, or one of the ids is missing (or is a label or a prefix).
    if len({*names}) < len(names) or covered - {*below}:
        return None
    return frozenset({*below} - covered)  # dependencies have no row: the "real heads"


# -- Commands --------------------------------------------------------------------------
# Each calls one method, returns what goes to stdout, and can be mounted anywhere.

#: By parameter name: how it is written, what its value is ("*": repeatable), help.
_OPTIONS: t.Final = {
    "message": ("-m/--message", "TEXT", "What the revision does."),
    "empty": ("--empty", "", "Write an empty revision; compare nothing."),
    "branch": ("-b/--branch", "BRANCH", "Branch to continue, or to start."),
    "parent": ("-p/--parent/--head", "REVISION*", "Revision that it follows."),
    "splice": ("--splice", "", "Allow a parent that is not a head."),
    "depend": ("-d/--depend/--depends-on", "REVISION*", "Revision to run before it."),
    "label": ("-l/--label/--branch-label", "LABEL*", "Further label for its branch."),
    "path": ("--path/--version-path", "FOLDER", "Version location to write to."),
    "rev_id": ("--rev-id", "ID", "Its revision id, instead of a timestamp."),
    "sql": ("--sql", "", "Print the SQL script instead of running it."),
    "purge": ("--purge", "", "Delete all rows of the version table first."),
    "tag": ("--tag", "TEXT", "Value of context.get_tag_argument()."),
    "x": ("-x/--x-arg", "KEY=VALUE*", "Value of context.get_x_argument()."),
    "json": ("--json", "", "Print JSON."),
    "check_heads": ("-c/--check-heads", "", "Exit with 1 unless all heads are there."),
    "resolve_dependencies": ("--resolve-dependencies", "", "Leave out dependencies."),
    "start": ("--start", "REVISION", "Oldest revision to show."),
    "end": ("--end", "REVISION", "Newest revision to show."),
    "rev_range": ("-r/--rev-range", "A:B", "The same as --start A --end B."),
    "indicate_current": ("-i/--indicate-current", "", "Mark the current revisions."),
    "database": ("-n/--database", "NAME*", "Database to work on, instead of all."),
    "quiet": ("-q/--quiet", "", "Show no progress."),
    "verbose": ("-v/--verbose", "", "Show more, and the traceback of an error."),
}
#: The commands, for applications that mount them under a group of their own.
cli: t.Final[AppGroup] = AppGroup("db", help="Perform database migrations.")


def _command(names: str, keys: str = "") -> cabc.Callable[[t.Any], None]:
    """Add a command, and an alias, with arguments (in capitals) and _OPTIONS."""
    params: list[click.Parameter] = []
    for key in f"{keys} verbose".split():
        if key.isupper():
            nargs, dots = (-1, "...") if key.endswith("S") else (1, "")
            kind: dict[str, t.Any] = {"nargs": nargs, "required": False}
            kind["metavar"] = f"[{key.rstrip('_')}]{dots}"
            params.append(click.Argument([key.lower()], **kind))
            continue
        written, metavar, text = _OPTIONS[key]
        kind = {"is_flag": not metavar or None, "multiple": metavar.endswith("*")}
        text += " Can be repeated." if kind["multiple"] else ""
        kind |= {"metavar": metavar.rstrip("*"), "help": text}
        params.append(click.Option([*written.split("/"), key], **kind))

    def add(callback: t.Any) -> None:
        kind = {"params": params, "help": callback.__doc__}
        kind["short_help"] = callback.__doc__.partition("\n")[0]
        # A target may be "-2".
        kind["context_settings"] = {"ignore_unknown_options": "TARGET" in keys.split()}
        for each in names.split():  # the first is the name that the help lists
            make = cli.command(each, hidden=not names.startswith(each), **kind)
            make(functools.partial(_run_command, callback))

    return add


def _run_command(callback: t.Any, verbose: bool, **options: t.Any) -> None:
    """Print what a command returns, and make one line of an error of the user's."""
    given = {k: value for k, value in options.items() if value not in ((), None, False)}
    alembic = current_app.extensions.get("alembic") or Alembic()  # says what is missing
    app_shows = given.get("quiet") or logging.root.handlers or _logger.handlers
    try:
        with contextlib.nullcontext() if app_shows else _logged(_say):
            marks = given.pop("indicate_current", False)
            states = alembic.status(given.get("database")) if marks else {}
            commands = _Commands(alembic, verbose, states)
            for each in callback(commands, **given) or ():
                click.echo(each if isinstance(each, str) else commands.line_of(each))
    except KeyboardInterrupt as error:
        # That of an event loop stands for a cancellation, which has the notes.
        told = error if hasattr(error, "__notes__") else error.__context__
        _say("\n".join(["", *getattr(told, "__notes__", ())]))
        raise
    except (Exception, SystemExit) as error:
        clicks = (click.ClickException, click.exceptions.Exit, BrokenPipeError)
        if isinstance(error, clicks) and not hasattr(error, "__notes__"):
            raise  # else a revision raised it
        line, frames = _line_of(error), traceback.walk_tb(error.__traceback__)
        if verbose or line is None:
            ours = [frame.f_globals is globals() for frame, _ in frames]
            limit = None if verbose else -ours[::-1].index(True) or None  # after ours
            _say("".join(traceback.format_exception(error, limit=limit)).rstrip())
        failed = click.ClickException(line) if line else click.exceptions.Exit(1)
        raise failed from error


@dataclasses.dataclass
class _Commands:
    """What the commands share while one of them runs; each is registered above."""

    alembic: Alembic
    verbose: bool
    states: dict[str, DatabaseStatus]  # to mark current revisions

    @_command("mkdir init")
    def mkdir(self) -> None:
        """Make the migrations folder and its template, if missing (alias: init)."""
        self.alembic.mkdir()

    @_command(
        "revision migrate",
        "MESSAGE_ message empty branch parent splice depend label path rev_id x"
        " database",
    )
    def revision(self, message_: str = "", message: str = "", **rest: t.Any) -> t.Any:
        """Write a revision file from what changed in the models (alias: migrate).

        MESSAGE says what. The databases, which the models are compared with, have to be
        up to date. Review the file. When nothing changed, none is written.
        """
        if message_ and message:
            raise click.UsageError("Give the message either as MESSAGE or with '-m'.")
        made = self.alembic.revision(message_ or message, **rest)
        if not made:
            models = [x.metadata for x in _find_targets(self.alembic).values()]
            has_tables = any(x.tables for each in models for x in _as_list(each))
            advice = "give --empty" if has_tables else "no table: import the models"
            _say(f"No changes detected; {advice}.")
        return [script.path for script in made]

    @_command("merge", "REVISIONS message label rev_id splice")
    def merge(self, **options: t.Any) -> list[str]:
        """Write a revision that joins REVISIONS (or branches), by default all heads."""
        return [self.alembic.merge(**options).path]

    @_command("upgrade", "TARGET sql quiet tag x database")
    def upgrade(self, target: str = "heads", **options: t.Any) -> t.Any:
        """Run the revisions that lead up to TARGET, by default to all heads.

        TARGET is a revision id or its beginning, 'head', 'BRANCH@head', or steps: '+2'.
        --sql takes [START:]TARGET; START is 'base', or 'current' to ask the database.
        """
        return self.migrate("upgrade", target, **options)

    @_command("downgrade", "TARGET sql quiet tag x database")
    def downgrade(self, target: str = "-1", **options: t.Any) -> t.Any:
        """Undo the last revision, or all down to TARGET, by default '-1'.

        TARGET is a revision id or its beginning, 'base', 'BRANCH@base', or steps: '-2',
        'BRANCH@-1'. --sql takes START:TARGET; START may be 'current', to ask.
        """
        if options.get("sql") and not all(target.partition(":")):
            raise click.UsageError("'--sql' needs START:TARGET here, as 'current:-1'.")
        return self.migrate("downgrade", target, **options)

    @_command("stamp", "TARGETS purge sql tag x database")
    def stamp(self, targets: t.Any = ("heads",), **options: t.Any) -> t.Any:
        """Write TARGETS, by default 'heads', into the version table; run nothing.

        TARGETS are revision ids or their beginnings, 'heads', 'base' or 'BRANCH@head'.
        Rows of branches not named stay. With --sql, the first may be START:TARGET.
        """
        return self.migrate("stamp", *targets, **options)

    @_command("status", "json database")
    def status(self, json: bool = False, **options: t.Any) -> t.Any:
        """Show where each database stands, and what is pending."""
        from json import dumps

        data: dict[str, t.Any] = {}
        for name, state in self.alembic.status(**options).items():
            pending = [
                {"revision": x.revision, "message": _summary(x), "path": x.path}
                for x in state.pending
            ]
            data[name] = {**state._asdict(), "pending": pending}
            words = f"{_count(pending)} pending" if pending else "up to date"
            ids = ", ".join(state.unknown)
            lines = [f"{name}: {f'unknown ids: {ids}' if ids else words}"]
            kinds = ("current", "head", "pending")
            for kind, scripts in zip(kinds, state[:3], strict=True):
                texts = [f"{x.revision}  {_summary(x)}".rstrip() for x in scripts]
                lines += [f"  {kind:<7}  {text}" for text in texts]
            yield from [] if json else lines
        if json:
            yield dumps({"databases": data}, indent=2, default=lambda x: x.revision)

    @_command("current", "check_heads database")
    def current(self, check_heads: bool = False, database: t.Any = ()) -> t.Any:
        """Show the revisions that each database is at."""
        names = database or self.alembic.databases
        found = {name: self.alembic.current(name) for name in names}
        for name, scripts in found.items():
            yield from [f"Database: {name}"] if len(names) > 1 else []
            yield from scripts
        if check_heads and self.alembic.needs_upgrade(names):
            yield "Database is not on all head revisions"
            raise click.exceptions.Exit(1)

    @_command("check", "database")
    def check(self, database: t.Any = ()) -> t.Any:
        """Exit with 1 if models and databases differ, or a branch has several heads."""
        lines: list[str] = []
        for name in database or self.alembic.databases:
            found: list[str] = []
            with _logged(found.append):
                diffs = self.alembic.compare_metadata(name)
            if diffs:
                pending = self.alembic.status(name)[name].pending
                note = f", which has {_count(pending)} pending" if pending else ""
                lines += [f"Changes detected in database '{name}'{note}:"]
                lines += [f"  {line}" for line in found or map(repr, diffs)]
        branches: dict[str, list[str]] = {}
        for head in self.alembic.heads():
            for branch in sorted(head.branch_labels) or ["default"]:
                branches.setdefault(branch, []).append(head.revision)
        for ids, branch in {tuple(v): k for k, v in branches.items()}.items():
            lines += [f"Branch '{branch}': {_several_heads(ids)}"] if ids[1:] else []
        yield from lines or ["No changes detected."]
        if lines:
            raise click.exceptions.Exit(1)

    @_command("heads", "resolve_dependencies")
    def heads(self, **options: t.Any) -> t.Any:
        """Show the revisions that no other follows."""
        return self.alembic.heads(**options)

    @_command("branches")
    def branches(self) -> t.Any:
        """Show the revisions that more than one other follows, and those."""
        for script in self.alembic.branches():
            yield script
            for each in _scripts(self.alembic.script_directory, sorted(script.nextrev)):
                yield f"    -> {each.revision}  {_summary(each)}"

    @_command("log history", "start end rev_range indicate_current database")
    def log(self, rev_range: str = "", **options: t.Any) -> t.Any:
        """Show the history, newest first, by default all of it (alias: history).

        Either end is a revision id or its beginning, 'BRANCH@head', or 'current'.
        """
        start, end = options.get("start", ""), options.get("end", "")
        if rev_range and (start or end or ":" not in rev_range):
            raise click.UsageError("'-r' takes A:B, in place of '--start' and '--end'.")
        if rev_range:
            start, end = rev_range.split(":", 1)
        return self.alembic.log(start or "base", end or "heads")

    @_command("show", "REVISIONS indicate_current database")
    def show(self, revisions: t.Any = ("head",), database: t.Any = None) -> t.Any:
        """Show REVISIONS (ids, 'BRANCH@head', 'current') in full, by default 'head'."""
        self.verbose = True
        for name in revisions:
            if name == "current":
                yield from self.alembic.current(database)
            else:
                yield from _scripts(self.alembic.script_directory, name)

    @_command("edit", "REVISION")
    def edit(self, revision: str = "head") -> None:
        """Open the file of REVISION, by default of the head, in your $EDITOR."""
        for script in _scripts(self.alembic.script_directory, revision):
            click.edit(filename=script.path)

    def migrate(self, verb: str, *targets: str, **options: t.Any) -> t.Any:
        """Upgrade, downgrade or stamp, telling of the progress; or make SQL of it."""
        sql, quiet = options.pop("sql", False), options.pop("quiet", False)
        start, colon, first = targets[0].rpartition(":")
        if not first or (colon and not sql) or re.match(r"-(?!\d+$)", targets[0]):
            raise click.UsageError(f"'{targets[0]}' is no TARGET. START: needs --sql.")
        if sql and options.pop("purge", False):
            raise click.UsageError("Give either '--sql' or '--purge'.")
        target = (first, *targets[1:]) if targets[1:] else first
        if sql:
            make = getattr(self.alembic, f"{verb}_sql")
            scripts = make(target, start or "base", **options)
            form = "-- Database: {}\n\n{}\n" if len(scripts) > 1 else "{1}"
            return [form.format(name, text.rstrip()) for name, text in scripts.items()]

        def report(name: str, script: Script, at: int, of: int, took: float) -> None:
            id_ = click.style(script.revision, fg="cyan")
            words = [f"{at:>3}/{of}", *[name] * several, id_, _summary(script)]
            _say(f"{'  '.join(filter(None, words))} ... {took:.2f}s")

        several, began = len(self.alembic.databases) > 1, time.perf_counter()
        g.flask_alembic_report = None if quiet else report
        try:
            ran = getattr(self.alembic, verb)(target, **options)
        finally:
            g.pop("flask_alembic_report")
        if verb != "stamp" and not quiet and ran is not None:  # as overrides may return
            done = f"{_count(ran)} {verb}d in {time.perf_counter() - began:.2f}s."
            _say(done if ran else "Nothing to do.")
        return ran if verb == "stamp" else None

    def line_of(self, script: Script) -> str:
        """A revision as Alembic shows it; its own mark is state that threads share."""
        kinds = {"include_branches": True, "include_parents": True}
        text = script.cmd_format(self.verbose, **kinds)
        for names in (script.branch_labels, script.nextrev):  # sets
            text = text.replace(", ".join(names), ", ".join(sorted(names)), 1)
        at = [name for name, state in self.states.items() if script in state.current]
        where = f": {', '.join(at)}" if len(at) < len(self.states) else ""
        mark = f" (current{where})" if at else ""
        if self.verbose:
            return text.replace("\n", f"{mark}\n", 1)
        return f"{text}{mark}, {_summary(script)}".removesuffix(", ")


def _summary(script: Script) -> str:
    """The message in one line; without one, Alembic takes what follows for it."""
    text = " ".join((script.doc or "").split())
    return "" if text.startswith("Revision ID: ") else text


def _count(revisions: cabc.Sequence[t.Any]) -> str:
    return f"{len(revisions)} revision{'' if len(revisions) == 1 else 's'}"


def _say(text: str) -> None:
    """Tell on stderr. That nobody can read it must not stop a migration."""
    try:
        click.echo(text, err=True)
    except (OSError, ValueError):
        sys.stderr = None  # or Python tries again when it exits, and fails


@contextlib.contextmanager
def _logged(tell: cabc.Callable[[str], t.Any]) -> cabc.Generator[None]:
    """Hand what Alembic detects and what we log to a function, and to no other."""

    def handle(record: logging.LogRecord) -> bool:
        # Alembic names one of its objects, or our function, in one of its lines.
        text = re.sub("^.*<.*> detected", "Detected changed", record.getMessage())
        wanted = record.name == _logger.name or re.match("Detected (?!sequence)", text)
        if wanted or record.levelno > logging.INFO:
            tell(text)
        return False

    handler = logging.Handler()
    handler.addFilter(handle)
    with contextlib.ExitStack() as undo:
        for logger in (logging.getLogger("alembic"), _logger):
            undo.callback(logger.setLevel, logger.level)  # forgets levels it looked up
            undo.callback(vars(logger).update, vars(logger).copy())
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.INFO)
        yield
