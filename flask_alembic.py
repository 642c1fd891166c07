"""Database migrations for Flask, by Alembic, in one module.

As ``flask db`` commands and as Python calls, for Flask-SQLAlchemy,
Flask-SQLAlchemy-Lite and plain SQLAlchemy.

    from flask_alembic import Alembic

    alembic = Alembic(app)

    with app.app_context():
        alembic.revision("add users")
        alembic.upgrade()

Rooms, in order (``grep -n '^# -- '`` prints them): the extension that users call; what
it keeps and reads; the databases it works on; the environment through which every
migration goes; the guards around it; autogenerate; the quick look; the commands.
"""

from __future__ import annotations

import ast
import collections.abc as cabc
import contextlib
import datetime
import decimal
import dis
import fnmatch
import functools
import logging
import os
import re
import sys
import threading
import time
import types
import typing as t
import uuid
import warnings
import weakref
from contextvars import ContextVar
from importlib.machinery import SourceFileLoader

import click
import sqlalchemy as sa
from flask import Flask
from flask import current_app
from flask import g
from flask.cli import AppGroup
from flask.cli import ScriptInfo
from flask.helpers import get_debug_flag
from sqlalchemy import event
from sqlalchemy import exc

if t.TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from alembic.config import Config
    from alembic.operations import MigrateOperation
    from alembic.operations import MigrationScript
    from alembic.operations import Operations
    from alembic.operations.ops import DowngradeOps
    from alembic.operations.ops import UpgradeOps
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.runtime.migration import RevisionStep
    from alembic.runtime.migration import StampStep
    from alembic.script import Script
    from alembic.script import ScriptDirectory
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "Alembic",
    "DatabaseStatus",
    "FlaskAlembicError",
    "MigrationLockTimeout",
    "PlannedStep",
    "RunOptions",
    "cli",
]

# -- Types and constants ---------------------------------------------------------------

_R = t.TypeVar("_R")
_Step: t.TypeAlias = "RevisionStep | StampStep"
_Heads: t.TypeAlias = "tuple[str, ...]"
#: What :meth:`Alembic.run_migrations` calls to learn which steps to run.
StepFunction: t.TypeAlias = (
    "cabc.Callable[[t.Any, MigrationContext], cabc.Iterable[_Step]]"
)
#: One revision or several: ids, unique prefixes, scripts, symbols (``users@head``).
RevisionTarget: t.TypeAlias = "str | int | Script | cabc.Sequence[str | Script]"
DatabaseNames: t.TypeAlias = "str | cabc.Sequence[str] | None"
XArguments: t.TypeAlias = "cabc.Mapping[str, t.Any] | cabc.Sequence[str] | str | None"
MetadataOption: t.TypeAlias = "sa.MetaData | cabc.Sequence[sa.MetaData]"
EngineOption: t.TypeAlias = "sa.Engine | AsyncEngine"

#: What stands for revisions, and so can be the name of none.
_SYMBOLS: t.Final = ("base", "head", "heads", "current")
_logger: t.Final = logging.getLogger("flask_alembic")
_MYSQL: t.Final = ("mysql", "mariadb")


class RunOptions(t.TypedDict, total=False):
    """What the methods that migrate take beside their target."""

    #: The databases to work on: a name or several; all when left out.
    database: DatabaseNames
    #: For ``context.get_tag_argument()`` in revisions.
    tag: str | None
    #: For ``context.get_x_argument()``: a dict, or a list of ``KEY=VALUE``.
    x: XArguments


class DatabaseStatus(t.NamedTuple):
    """Where one database stands, as :meth:`Alembic.status` reports it."""

    #: Revisions in the version table.
    current: tuple[Script, ...]
    #: Revisions that an upgrade leads to.
    heads: tuple[Script, ...]
    #: Revisions that an upgrade would run, in order; empty while ids are unknown.
    pending: tuple[Script, ...]
    #: Ids in the version table that no revision file has.
    unknown: tuple[str, ...]


class PlannedStep(t.NamedTuple):
    """One step of :meth:`Alembic.upgrade_plan` or :meth:`Alembic.downgrade_plan`."""

    revision: Script
    is_upgrade: bool
    #: What the step drops: ``"table users"``, ``"column users.name"``.
    drops: tuple[str, ...]
    #: Why its operations could not be read without running it, or ``None``.
    problem: str | None = None


class _Progress(t.NamedTuple):
    """A step that starts (``seconds`` is ``None``) or is done."""

    database: str
    revision: Script
    is_upgrade: bool
    number: int
    total: int
    seconds: float | None


_progress: t.Final[ContextVar[cabc.Callable[[_Progress], None] | None]] = ContextVar(
    "flask_alembic_progress", default=None
)


# -- Errors ----------------------------------------------------------------------------


class FlaskAlembicError(RuntimeError):
    """Set-up or configuration is missing or wrong, or going on would not be safe."""


class MigrationLockTimeout(FlaskAlembicError):
    """Another process held a database's migration lock for too long.

    :param database: Name of the database.
    :param seconds: How long this process waited.
    :param advice: How to find the holder.
    """

    def __init__(self, database: str, seconds: float, advice: str) -> None:
        super().__init__(
            f"The migration lock of database '{database}' is held by another"
            f" connection; gave up after {seconds:.1f} s. To find the holder: {advice}."
            " Set 'migration_lock_timeout' in ALEMBIC to wait longer, or"
            " 'migration_lock' to False to go without the lock."
        )
        self.database = database
        self.seconds = seconds

    def __reduce__(self) -> tuple[t.Any, ...]:
        return RuntimeError.__new__, (type(self), *self.args), self.__dict__


#: Key in an exception's ``__dict__``: ``"revision"`` when a revision's own code raised
#: it, ``"connect"`` when the database could not be reached. Types alone do not tell.
_ORIGIN: t.Final = "_flask_alembic_origin"


def _is_user_error(error: BaseException) -> bool:
    """Whether one line says all: wrong set-up, a wrong request, no connection."""
    if origin := error.__dict__.get(_ORIGIN):
        return bool(origin == "connect")

    # Where Alembic was never imported, it cannot have raised.
    module = sys.modules.get("alembic.util.exc")
    kinds = (FlaskAlembicError, module.CommandError) if module else FlaskAlembicError
    return isinstance(error, kinds)


def _user_message(error: BaseException) -> str:
    """The one line for an error of which :func:`_is_user_error` is true."""
    is_connect = error.__dict__.get(_ORIGIN) == "connect"
    return str(error.__notes__[0]) if is_connect else " ".join(str(error).split())


def _command_error(message: str) -> Exception:
    from alembic.util import CommandError

    return CommandError(message)


# -- Extension -------------------------------------------------------------------------


class Alembic:
    """Alembic's migrations for Flask applications.

    Methods that talk to databases take ``database``: a name or several; all when left
    out. For the ``options`` of those that migrate, see :class:`RunOptions`.

    :param app: Application to set up; else call :meth:`init_app`.
    :param run_mkdir: Make the migrations folder in :meth:`init_app` when it is missing.
    :param command_name: Name of the command group; empty registers no commands.
    :param metadatas: A metadata, a list of them (one database), or a dict of database
        name to either. Found in Flask-SQLAlchemy when left out.
    :param engines: An engine, sync or async, or a dict of database name to engine.
        Found in Flask-SQLAlchemy and Flask-SQLAlchemy-Lite when left out.
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
        #: Metadata by database name, as given; empty when detection finds them.
        self.metadatas: dict[str, MetadataOption] = _by_name(metadatas)
        #: Engines by database name, as given.
        self.engines: dict[str, EngineOption] = _by_name(engines)
        self._caches = weakref.WeakKeyDictionary[Flask, _Cache]()

        if app is not None:
            self.init_app(app)

    def init_app(
        self, app: Flask, run_mkdir: bool | None = None, command_name: str | None = None
    ) -> None:
        """Set up an application: configuration defaults, commands, migrations folder.

        No database is touched; a folder that cannot be made is no error yet.

        :param run_mkdir: Overrides the constructor's, as does ``command_name``.
        :raises FlaskAlembicError: If ``ALEMBIC`` or ``ALEMBIC_CONTEXT`` cannot be used.
        """
        app.extensions["alembic"] = self
        self._caches[app] = _Cache(self)
        options = _config_dict(app, "ALEMBIC")
        options.setdefault("script_location", "migrations")
        options.setdefault("version_locations", [])
        options.setdefault("path_separator", "os")
        _config_dict(app, "ALEMBIC_CONTEXT").setdefault("compare_server_default", True)
        template = _read_settings(app).template
        app.teardown_appcontext(self._close_context)
        name = self.command_name if command_name is None else command_name

        if name:
            app.cli.add_command(cli, name)

        wanted = self.run_mkdir if run_mkdir is None else run_mkdir

        if wanted and not os.path.isfile(template):
            with contextlib.suppress(FlaskAlembicError), app.app_context():
                self.mkdir()

    # What reaches Alembic's objects

    @property
    def config(self) -> Config:
        """Alembic's configuration of the current application."""
        cache = self._get_cache()
        cache.config = cache.config or _alembic_config(cache.settings)
        return cache.config

    @property
    def script_directory(self) -> ScriptDirectory:
        """The revision files; read again when one was added, removed or changed.

        :raises FlaskAlembicError: If the folder is missing or a file cannot be loaded.
        :raises CommandError: If the files form no history.
        """
        return self._get_cache().load_scripts(self.config)

    @property
    def environment_context(self) -> EnvironmentContext:
        """Alembic's environment of the ``default`` or only database."""
        scope = self._scope()
        scope.environment = scope.environment or self._new_environment(scope)
        return scope.environment

    @property
    def migration_contexts(self) -> dict[str, MigrationContext]:
        """A migration context, with an open connection, per database name.

        They last as long as the application context. With async engines, use them in
        :meth:`run_sync` only.
        """
        return {name: self._context(name) for name in self._scope().names(self)}

    @property
    def migration_context(self) -> MigrationContext:
        """The migration context of the ``default`` or only database."""
        contexts = self.migration_contexts
        return contexts[_primary(contexts)]

    @property
    def ops(self) -> dict[str, Operations]:
        """Alembic's operations per database name, each bound to its database."""
        from alembic.operations import Operations

        # Kept with their context, so that they last as long.
        return {
            name: context.opts.setdefault("operations", Operations(context))
            for name, context in self.migration_contexts.items()
        }

    @property
    def op(self) -> Operations:
        """Alembic's operations on the ``default`` or only database."""
        ops = self.ops
        return ops[_primary(ops)]

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
        return tuple(_find_targets(self.metadatas, self.engines))

    def run_sync(self, fn: cabc.Callable[..., _R], *args: t.Any) -> _R:
        """Call ``fn(*args)`` where low-level objects of an async engine may be used.

        With an async engine, it runs inside an event loop of its own. What it opens
        through the low-level objects is closed when it returns.
        """
        return self._call(lambda scope: fn(*args))

    # What writes, in the order of the workflow

    def mkdir(self) -> None:
        """Make the migrations folder, the version locations and ``script.py.mako``.

        What exists stays, but for Alembic's unchanged template for one database, when
        there are several.

        :raises FlaskAlembicError: If a folder or the file cannot be made.
        """
        settings = self._get_cache().settings
        template, generic = settings.template, _stock_template("generic")
        several = len(self._configured_names()) > 1
        source = _stock_template("multidb") if several else generic

        try:
            for folder in (settings.script_location, *settings.locations):
                os.makedirs(folder, exist_ok=True)

            if not os.path.isfile(template) or (
                several and _same_content(template, generic)
            ):
                import shutil

                shutil.copyfile(source, template)
        except OSError as error:
            raise FlaskAlembicError(
                f"Cannot make the folder '{settings.script_location}': {error}."
            ) from error

    def rev_id(self) -> str:
        """Make the id of a new revision: the time in UTC seconds.

        Override or assign it for ids of another kind. Digits that are taken are counted
        up; another id that is taken is refused.
        """
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
        database: DatabaseNames = None,
        x: XArguments = None,
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
        :param rev_id: Its id; see :meth:`rev_id`.
        :param x: Arguments for ``context.get_x_argument()``.
        :return: The new revisions; none when autogenerate finds nothing.
        :raises CommandError: If it does not fit the history, or a database is behind.
        :raises FlaskAlembicError: If no models were imported, or the template is wrong.
        """
        script, settings = self.script_directory, self._get_cache().settings
        self._check_template()
        _try_values(settings, "output_encoding", "timezone")
        arguments = {
            "message": message,
            "autogenerate": not empty,
            "sql": False,
            "rev_id": self._free_id(script, rev_id),
            "splice": splice,
            "depends_on": None if depend is None else _identifiers(depend),
            **_place(settings, script, branch, parent, label, path),
        }

        def work(scope: _Scope) -> list[Script]:
            return _generate(self, scope, script, arguments)

        if not empty or settings.is_on("revision_environment"):
            return self._call(work, database=database, x=x)

        # No database is needed, and so none is looked for.
        with _Scope(self._scope(), x=x) as scope:
            return work(scope)

    def merge(
        self,
        revisions: RevisionTarget = "heads",
        message: str | None = None,
        label: str | cabc.Sequence[str] | None = None,
        *,
        rev_id: str | None = None,
        splice: bool = False,
    ) -> Script:
        """Write a revision that joins several heads. No database is touched.

        :param revisions: Revisions or branch names to join.
        :param message: Its message.
        :param label: Branch labels for it.
        :param rev_id: Its id; see :meth:`rev_id`.
        :param splice: Allow revisions that are not heads.
        :raises CommandError: If there are fewer than two, or a label is taken.
        """
        script = self.script_directory
        labels = _branch_labels(script)
        names = _as_list(_identifiers(revisions))
        wanted = [f"{name}@head" if name in labels else name for name in names]
        found = {s.revision: s for name in wanted for s in _scripts(script, name)}

        if len(found) < 2:
            raise _command_error(
                "A merge needs at least two revisions; there is only"
                f" {', '.join(found) or 'none'}."
            )

        folder = os.path.dirname(next(iter(found.values())).path)
        [merged] = self.revision(
            "merge" if message is None else message,
            empty=True,
            parent=[*found],
            splice=splice,
            label=label,
            path=folder if folder in self._get_cache().settings.locations else None,
            # An override in a subclass may not know it: it is new.
            **({} if rev_id is None else {"rev_id": rev_id}),
        )
        return merged

    def upgrade(
        self, target: RevisionTarget = "heads", **options: t.Unpack[RunOptions]
    ) -> list[Script]:
        """Run the revisions that lead up to ``target``. See :meth:`run_migrations`.

        :param target: Revision to reach; an int, or digits that are no id, counts.
        :return: The revisions that ran, in order.
        :raises CommandError: If the target, or an id in a database, is unknown.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        return self._migrate("upgrade", target, **options)

    def downgrade(
        self, target: RevisionTarget = -1, **options: t.Unpack[RunOptions]
    ) -> list[Script]:
        """Run the downgrades that lead down to ``target``. Raises as :meth:`upgrade`.

        :param target: Revision to go back to; an int of either sign counts down.
        :return: The revisions that were taken back, in order.
        """
        return self._migrate("downgrade", target, **options)

    def stamp(
        self,
        target: RevisionTarget = "heads",
        *,
        purge: bool = False,
        **options: t.Unpack[RunOptions],
    ) -> tuple[Script, ...]:
        """Write ``target`` into the version tables without running a revision.

        :param target: Revision or revisions. Raises as :meth:`upgrade`.
        :param purge: Empty the version tables first, whatever they hold.
        :return: The revisions that are current now.
        """
        return tuple(self._migrate("stamp", target, purge, **options))

    def ensure_version(self, database: DatabaseNames = None) -> None:
        """Make the version tables that are missing. Raises as :meth:`upgrade`."""
        self._migrate("ensure-version", "base", database=database)

    def run_migrations(self, fn: StepFunction, **kwargs: t.Any) -> None:
        """Run steps on the databases: the one way of every migration.

        All locks are taken first, then all transactions are opened, then the steps run,
        then the transactions are committed. When anything fails, PostgreSQL and SQLite
        roll back completely; the error has a note that says what others did not.
        ``ALEMBIC_CONTEXT``, as ``transaction_per_migration``, can change this.

        :param fn: Called as ``fn(heads, migration_context)``, returns the steps to run.
        :param kwargs: Passed to each ``upgrade`` or ``downgrade`` function.
        :raises MigrationLockTimeout: If another process holds the lock for too long.
        """
        _refuse_nested()

        scope = self._scope()

        if scope is scope.base:
            self._call(lambda scope: _run_online(self, scope, fn, kwargs))
        else:
            # Called by a method such as 'upgrade': the databases are the ones it chose.
            _run_online(self, scope, fn, kwargs)

    # What makes SQL instead of connecting

    def upgrade_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: t.Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make the SQL script of an upgrade, by database name. No connection is made.

        :param start: Revision that the database has; ``current`` reads it there.
        :raises CommandError: If the range is none, or a revision needs a connection.
        """
        return self._sql("upgrade", target, start, **options)

    def downgrade_sql(
        self, target: RevisionTarget, start: str, **options: t.Unpack[RunOptions]
    ) -> dict[str, str]:
        """Make the SQL script of a downgrade. See :meth:`upgrade_sql`."""
        return self._sql("downgrade", target, start, **options)

    def stamp_sql(
        self,
        target: RevisionTarget = "heads",
        start: str = "base",
        **options: t.Unpack[RunOptions],
    ) -> dict[str, str]:
        """Make the SQL script of a stamp. See :meth:`upgrade_sql`."""
        return self._sql("stamp", target, start, **options)

    def ensure_version_sql(self, database: DatabaseNames = None) -> dict[str, str]:
        """Make the SQL script that makes the version table. See :meth:`upgrade_sql`."""
        return self._sql("ensure-version", "base", database=database)

    # What only reads

    def current(self, database: DatabaseNames = None) -> tuple[Script, ...]:
        """Get the revisions in the version tables.

        :raises CommandError: If a database has an id that no file has.
        """
        return self._call(self._current, database=database)

    def heads(self, resolve_dependencies: bool = False) -> tuple[Script, ...]:
        """Get the revisions that no other follows.

        :param resolve_dependencies: Leave out those that another branch depends on.
        """
        script = self.script_directory
        names = "heads" if resolve_dependencies else script.get_heads()
        return script.get_revisions(names)

    def branches(self) -> list[Script]:
        """Get the revisions that more than one other follows."""
        return [s for s in self.script_directory.walk_revisions() if s.is_branch_point]

    def diverged(self) -> dict[str, list[Script]]:
        """Get the branches that have more than one head, by label, with their heads."""
        found: dict[str, list[Script]] = {}

        for head in self.heads():
            name = ", ".join(sorted(head.branch_labels)) or "default"
            found.setdefault(name, []).append(head)

        return {name: heads for name, heads in found.items() if len(heads) > 1}

    def log(
        self, start: RevisionTarget = "base", end: RevisionTarget = "heads"
    ) -> list[Script]:
        """Get the revisions from ``end`` down to ``start``, both included.

        Either may be ``current``, which reads the databases.
        """
        lower, upper = (
            tuple(each.revision for each in self.current())
            if name == "current"
            else _identifiers(name)
            for name in (start, end)
        )
        script = self.script_directory
        return list(script.walk_revisions(t.cast(str, lower), t.cast(str, upper)))

    def status(self, database: DatabaseNames = None) -> dict[str, DatabaseStatus]:
        """Tell where each database stands. Nothing is written, no table is made."""

        def work(scope: _Scope) -> dict[str, DatabaseStatus]:
            script = self.script_directory
            heads = script.get_revisions("heads")
            result = {}

            for name, rows in self._rows().items():
                unknown = _unknown(script, rows)
                current = script.get_revisions(sorted({*rows} - {*unknown}))
                steps = [] if unknown else _upgrade_steps(script, "heads", rows)
                pending = tuple(step.revision for step in steps)
                result[name] = DatabaseStatus(current, heads, pending, unknown)

            return result

        return self._call(work, database=database)

    def needs_upgrade(self, database: DatabaseNames = None) -> bool:
        """Tell whether :meth:`upgrade` would run anything.

        :raises CommandError: If a database has an id that no file has.
        """
        steps = _Steps(self, "upgrade", "heads")

        def work(scope: _Scope) -> bool:
            current = self._is_current(scope, steps)
            return not current and any(_pending(self, steps).values())

        return self._call(work, database=database)

    def needs_revision(self, database: DatabaseNames = None) -> bool:
        """Tell whether models and database differ, as :meth:`compare_metadata` does."""
        return bool(self.compare_metadata(database))

    def compare_metadata(self, database: DatabaseNames = None) -> list[t.Any]:
        """List the differences between models and databases, as Alembic's tuples."""
        script = self.produce_migrations(database)
        return [diff for ops in script.upgrade_ops_list for diff in ops.as_diffs()]

    def produce_migrations(self, database: DatabaseNames = None) -> MigrationScript:
        """Make the operations, for each database, that would bring it to the models."""
        return self._call(lambda scope: _produce(self), database=database)

    def upgrade_plan(
        self, target: RevisionTarget = "heads", **options: t.Unpack[RunOptions]
    ) -> dict[str, list[PlannedStep]]:
        """Tell what :meth:`upgrade` would run and drop, in order, by database name.

        Revisions are called with operations that only record.
        """
        steps = _Steps(self, "upgrade", target)
        return self._call(lambda scope: _plan(self, scope, steps), **options)

    def downgrade_plan(
        self, target: RevisionTarget = -1, **options: t.Unpack[RunOptions]
    ) -> dict[str, list[PlannedStep]]:
        """Tell what :meth:`downgrade` would run. See :meth:`upgrade_plan`."""
        steps = _Steps(self, "downgrade", target)
        return self._call(lambda scope: _plan(self, scope, steps), **options)

    # Private

    def _get_cache(self) -> _Cache:
        """What is kept for the application. Subclasses reach it by this name."""
        app = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001

        if app not in self._caches:
            raise FlaskAlembicError(
                "The current application is not set up: call 'alembic.init_app(app)'."
            )

        return self._caches[app]

    def _configured_names(self) -> tuple[str, ...]:
        """Database names that need no look at the application's engines."""
        return tuple(self.metadatas) or ("default",)

    def _scope(self) -> _Scope:
        """The innermost scope of this extension in this application context."""
        bases = g.setdefault("_flask_alembic", {})
        base: _Scope = bases.setdefault(self, _Scope(None))
        return next((s for s in reversed(_scopes.get()) if s.base is base), base)

    def _close_context(self, error: BaseException | None = None) -> None:
        """Give back what the low-level objects hold, when the context ends."""
        if scope := g.get("_flask_alembic", {}).pop(self, None):
            scope.close()

    def _call(
        self,
        work: cabc.Callable[[_Scope], _R],
        connects: bool = True,
        /,
        database: DatabaseNames = None,
        tag: str | None = None,
        x: XArguments = None,
    ) -> _R:
        """Do a method's work in a scope, in an event loop where a driver needs one."""
        targets = _find_targets(self.metadatas, self.engines)
        _check_version_tables(targets)
        chosen = _select(targets, database)

        def inside() -> _R:
            with _Scope(self._scope(), chosen, tag, x) as scope:
                return work(scope)

        is_async = any(target.is_async for target in chosen.values())
        return _in_loop(inside) if connects and is_async else inside()

    def _migrate(
        self, kind: t.Any, target: t.Any, purge: bool = False, /, **options: t.Any
    ) -> list[Script]:
        """Run steps, and tell which revisions ran, or are current after a stamp."""
        steps = _Steps(self, kind, target, purge=purge)

        def work(scope: _Scope) -> list[Script]:
            if not self._is_current(scope, steps):
                self.run_migrations(steps)

            done = self._current(scope) if kind == "stamp" else scope.ran.values()
            return list(done)

        return self._call(work, **options)

    def _sql(
        self, kind: t.Any, target: t.Any, start: str = "base", /, **options: t.Any
    ) -> dict[str, str]:
        steps = _Steps(self, kind, target, start)
        live = steps.start == "current"

        def work(scope: _Scope) -> dict[str, str]:
            return _run_offline(self, scope, steps, self._rows() if live else None)

        return self._call(work, live, **options)

    def _new_environment(self, scope: _Scope) -> EnvironmentContext:
        from alembic.runtime.environment import EnvironmentContext

        return EnvironmentContext(_with_x(self.config, scope.x), self.script_directory)

    def _context(self, name: str) -> MigrationContext:
        """The migration context of one database, opened when there is none."""
        scope = self._scope()

        if name not in scope.contexts:
            is_main = name == "default" or len(scope.names(self)) == 1
            env = self.environment_context if is_main else self._new_environment(scope)
            connection = scope.connect(self, name)
            env.configure(connection, **_options(self, name, connection))
            scope.contexts[name] = env.get_context()

        return scope.contexts[name]

    def _rows(self) -> dict[str, _Heads]:
        """The ids in each database's version table."""
        rows = {}

        for name, context in self.migration_contexts.items():
            with _left_as_found(context.connection):
                rows[name] = context.get_current_heads()

        return rows

    def _current(self, scope: _Scope) -> tuple[Script, ...]:
        script, rows = self.script_directory, self._rows()

        for name, ids in rows.items():
            _refuse_unknown(script, ids, name)

        found = dict.fromkeys(each for ids in rows.values() for each in ids)
        return script.get_revisions([*found])

    def _is_current(self, scope: _Scope, steps: _Steps) -> bool:
        """Whether there is surely nothing to run, found without importing Alembic."""
        settings = self._get_cache().settings
        names = ["config", "script_directory", "environment_context"]
        names += ["migration_contexts", "run_migrations"]

        if (
            (steps.kind, steps.target) != ("upgrade", "heads")
            # A subclass may see to it that other files or tables are looked at.
            or any(getattr(type(self), x) is not getattr(Alembic, x) for x in names)
            or settings.is_on("sourceless")
            or settings.is_on("recursive_version_locations")
        ):
            return False

        found = [
            _version_rows(scope.connect(self, name), _own_options(name))
            for name in scope.names(self)
        ]

        if not found[0] or any(rows != found[0] for rows in found):
            return False  # without a look at the files, which costs most

        return sorted(_quick_heads(settings.locations) or ()) == found[0]

    def _check_template(self) -> None:
        """Refuse a template that would write a file without its operations."""
        template = self._get_cache().settings.template
        names = self._configured_names()

        if not os.path.isfile(template):
            raise FlaskAlembicError(f"'{template}' is missing: run 'flask db mkdir'.")

        if len(names) < 2:
            return

        if bad := [name for name in names if not name.isidentifier()]:
            raise FlaskAlembicError(
                f"Several databases name functions, which {_quoted(bad)} cannot:"
                " rename the keys of 'metadatas'."
            )

        with open(template, encoding="utf-8") as file:
            if "_upgrades" not in file.read():
                raise FlaskAlembicError(
                    f"'{template}' is for one database, but there are several: move it"
                    " away, then run 'flask db mkdir'."
                )

    def _free_id(self, script: ScriptDirectory, wanted: str | None) -> str:
        """An id that no revision or branch has."""
        new = str(self.rev_id()) if wanted is None else wanted

        while wanted is None and new.isdecimal() and not _unknown(script, (new,)):
            new = str(int(new) + 1).zfill(len(new))

        _refuse_labels(script, [new])

        if not re.fullmatch(r"\w[\w.]*", new):
            raise _command_error(f"'{new}' cannot be a revision id.")

        return new


# -- State -----------------------------------------------------------------------------
# Three lifetimes: the extension keeps what its constructor was given, a cache keeps
# what belongs to an application, a scope keeps what is open: for a method until it
# returns, for the low-level objects until the application context ends.


class _Cache:
    """What is kept for one application: its configuration and its revision files."""

    config: Config | None = None
    _settings: _Settings | None = None
    _scripts: tuple[Config, t.Any, ScriptDirectory] | None = None

    def __init__(self, extension: Alembic) -> None:
        self._extension = weakref.proxy(extension)
        self._lock = threading.RLock()

    @property
    def settings(self) -> _Settings:
        self._settings = self._settings or _read_settings(current_app)
        return self._settings

    def clear(self) -> None:
        """Forget all, and give back what this application context holds open."""
        self.config = self._settings = self._scripts = None

        scope: _Scope | None = self._extension._scope()

        while scope:
            scope.close()
            scope = scope.outer

    def load_scripts(self, config: Config) -> ScriptDirectory:
        """The revision files, read again when they have changed."""
        # Many threads that start at once would each load them.
        with self._lock:
            known = self._scripts

            if known and known[0] is config and known[1] == _script_signature(known[2]):
                return known[2]

            script, signature = _load_scripts(config)
            self._scripts = (config, signature, script)
            return script


class _Scope:
    """What one method, or one application context, has open."""

    def __init__(
        self,
        outer: _Scope | None,
        targets: dict[str, _Target] | None = None,
        tag: str | None = None,
        x: XArguments = None,
    ) -> None:
        self.outer, self.tag, self.x = outer, tag, _x_list(x)
        self.base: _Scope = outer.base if outer else self
        self.environment: EnvironmentContext | None = None
        #: The revisions that the last run completed, by id.
        self.ran: dict[str, Script] = {}
        # Only the innermost scope opens anything, so a copy knows all that is open.
        self.contexts: dict[str, MigrationContext] = {}
        self.connections: dict[str, sa.Connection] = {}
        self._targets, self._open = targets, contextlib.ExitStack()

        if outer:
            self.contexts |= outer.contexts
            self.connections |= outer.connections

    def __enter__(self) -> _Scope:
        self._token = _scopes.set((*_scopes.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _scopes.reset(self._token)
        self.close()

    def targets(self, extension: Alembic) -> dict[str, _Target]:
        """The databases of this scope: those that were asked for, or all."""
        if self._targets is None and self.outer:
            return self.outer.targets(extension)

        self._targets = self._targets or _find_targets(
            extension.metadatas, extension.engines
        )
        return self._targets

    def names(self, extension: Alembic) -> list[str]:
        return list(self.targets(extension))

    def connect(self, extension: Alembic, name: str) -> sa.Connection:
        """The connection to a database, opened when there is none."""
        if name not in self.connections:
            target = self.targets(extension)[name]

            if target.is_async and not self.outer:
                raise FlaskAlembicError(
                    f"Database '{name}' has an async engine: use the low-level objects"
                    " inside of 'alembic.run_sync(fn)'."
                )

            self.connections[name] = self._open.enter_context(_connect(target))

        return self.connections[name]

    def close(self) -> None:
        """Give every connection that was opened here back to its pool."""
        self.environment = None
        self.contexts.clear()
        self.connections.clear()
        self._open.close()


_scopes: t.Final[ContextVar[tuple[_Scope, ...]]] = ContextVar(
    "flask_alembic_scopes", default=()
)


# -- Configuration ---------------------------------------------------------------------


class _Settings(t.NamedTuple):
    """``app.config["ALEMBIC"]``, checked and cast."""

    script_location: str
    #: Branch (or none) and absolute path of each version location.
    branches: list[tuple[str | None, str]]
    #: Where to resolve further relative paths.
    root: str
    #: Sections of ``alembic.ini``, the main one under ``""``; ready for ConfigParser.
    sections: dict[str, dict[str, str]]
    migration_lock: bool
    migration_lock_timeout: float | None
    lock_timeout: float | None
    statement_timeout: float | None
    exclude_tables: cabc.Sequence[str]

    @property
    def locations(self) -> list[str]:
        return list(dict.fromkeys(path for _, path in self.branches))

    @property
    def template(self) -> str:
        return os.path.join(self.script_location, "script.py.mako")

    def is_on(self, key: str) -> bool:
        return self.sections[""].get(key) == "true"


_OWN_DEFAULTS: t.Final[dict[str, t.Any]] = {
    "migration_lock": True,
    "migration_lock_timeout": 300,
    "lock_timeout": None,
    "statement_timeout": None,
    "exclude_tables": [],
}
_JOINTS: t.Final = {"space": " ", "newline": "\n", "os": os.pathsep, ":": ":", ";": ";"}
_HOOK: t.Final[t.Any] = cabc.Callable | None
#: The types of values; ``float`` stands for seconds, or none.
_KINDS: t.Final[dict[str, t.Any]] = {
    "migration_lock": bool,
    "migration_lock_timeout": float,
    "lock_timeout": float,
    "statement_timeout": float,
    "include_name": _HOOK,
    "include_object": _HOOK,
    "render_item": _HOOK,
    "process_revision_directives": _HOOK,
    "compare_type": _HOOK | int,
    "compare_server_default": _HOOK | int,
    "template_args": dict,
    "dialect_opts": (dict, type(None)),
    # What 'configure' takes without naming it.
    "version_table": str,
    "version_table_schema": str | None,
    "version_table_pk": int | None,
    "upgrade_token": str,
    "downgrade_token": str,
    "sqlalchemy_module_prefix": str | None,
    "user_module_prefix": str | None,
}
#: What options of dialects begin with; there are more dialects.
_DIALECTS: t.Final = {"mssql", "mysql", "mariadb", "oracle", "postgresql", "sqlite"}
_HINTS: t.Final = {
    "exclude_tables": "; it is a list of globs",
    **dict.fromkeys(
        ("migration_lock_timeout", "lock_timeout", "statement_timeout"),
        "; it is a number of seconds, or None",
    ),
}
#: What is not for ``ALEMBIC_CONTEXT``.
_OURS: t.Final = {"self", "kw", "connection", "url", *_OWN_DEFAULTS}


def _bad_value(key: str, value: t.Any, expected: str) -> FlaskAlembicError:
    return FlaskAlembicError(f"ALEMBIC['{key}'] must be {expected}, not {value!r}.")


def _config_dict(app: Flask, name: str) -> dict[str, t.Any]:
    """One of our dicts in the application's configuration, made when missing."""
    options = app.config.setdefault(name, {})

    if isinstance(options, dict) and all(isinstance(key, str) for key in options):
        return options

    raise FlaskAlembicError(
        f"The configuration value '{name}' must be a dict with names as keys, not"
        f" {options!r}."
    )


def _read_settings(app: Flask) -> _Settings:
    """Read, check and cast ``app.config["ALEMBIC"]``: the only place that does."""
    options = dict(_config_dict(app, "ALEMBIC"))
    own = {key: options.pop(key, default) for key, default in _OWN_DEFAULTS.items()}
    _check("ALEMBIC", own)

    for key in options:
        if re.search(r"^\w*_lock|^\w*_timeout|^exclude_", key):
            raise FlaskAlembicError(
                f"ALEMBIC has an unknown key '{key}'; ours are {_quoted(own)}."
            )

    separator = options.pop("path_separator", "os")

    if separator not in [*_JOINTS]:
        raise _bad_value("path_separator", separator, f"one of {_quoted(_JOINTS)}")

    joint = _JOINTS[separator]
    location = options.pop("script_location", None) or "migrations"
    root = os.path.abspath(app.root_path)
    home = _folder(root, location, "script_location")

    if location == "migrations" and not os.path.isdir(home):
        # Flask-Migrate's folder is where its commands ran: beside the package.
        beside = os.path.join(os.path.dirname(root), "migrations")
        home = beside if _is_nested(beside) else home

    further = options.pop("version_locations", None)
    own["exclude_tables"] = _as_list(own["exclude_tables"])
    branches = _version_locations(root, home, further, joint)
    settings = _Settings(home, branches, root, {}, **own)

    if any(joint in path for path in settings.locations):
        raise _bad_value("path_separator", separator, "one that is in no folder's name")

    # These two are literal paths: a percent sign in them stands for itself.
    settings.sections[""] = {
        "script_location": home.replace("%", "%%"),
        "version_locations": joint.join(settings.locations).replace("%", "%%"),
        "path_separator": separator,
    }

    for key, value in options.items():
        name, items = (key, value) if isinstance(value, dict) else ("", {key: value})
        section = settings.sections.setdefault(name, {})

        for option, each in items.items():
            if each is not None:
                is_path = option == "prepend_sys_path"
                section[str(option)] = _cast(key, each, joint if is_path else ", ")

    return settings


def _check(name: str, options: dict[str, t.Any]) -> None:
    """Refuse values over which Alembic or a server would stumble late, if at all."""
    for key, value in options.items():
        kind = _KINDS.get(key, object)

        if key == "exclude_tables":
            # A string would be one glob, which most likely matches nothing.
            good = isinstance(value, list | tuple)
            good = good and all(isinstance(each, str) for each in value)
        elif key == "on_version_apply":
            good = all(map(callable, _as_list(value)))
        elif kind is float:
            # A bool is an int.
            good = value is None or (type(value) in (int, float) and 0 <= value < 10**9)
        else:
            good = isinstance(value, kind)

        if not good:
            hint = _HINTS.get(key, "")
            raise FlaskAlembicError(f"{name}['{key}'] cannot be {value!r}{hint}.")


def _cast(key: str, value: t.Any, joint: str) -> str:
    """A value as ConfigParser takes it: a string whose percent signs are doubled."""
    if isinstance(value, bool):
        return str(value).lower()

    if isinstance(value, list | tuple):
        return joint.join(_cast(key, each, joint) for each in value)

    if not isinstance(value, (str, int, os.PathLike)):
        raise _bad_value(key, value, "a str, int, bool, Path or list of them")

    text = str(value if isinstance(value, int) else os.fspath(value))
    # Only 'here' is left to ConfigParser: the working directory.
    return re.sub(r"%(?:%|(?!\(here\)s))", "%%", text)


def _folder(root: str, value: t.Any, key: str) -> str:
    """The absolute path of a folder, given as a path or as ``package:folder``."""
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None

    if not path or not isinstance(path, str):
        raise _bad_value(key, value, "a path")

    path = path.replace("%%", "%")  # as ConfigParser has it
    package, colon, rest = path.partition(":")

    if colon and not os.path.isabs(path) and package.replace(".", "").isidentifier():
        import importlib.util

        spec = None

        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)

        if spec is None or not spec.submodule_search_locations:
            raise _bad_value(key, value, f"a path; there is no package '{package}'")

        root, path = spec.submodule_search_locations[0], rest

    return os.path.normpath(os.path.join(root, path))


def _version_locations(
    root: str, home: str, value: t.Any, joint: str
) -> list[tuple[str | None, str]]:
    """The version locations: the migrations folder, then those that are configured."""
    key = "version_locations"

    if isinstance(value, str):
        value = [*filter(None, map(str.strip, value.split(joint)))]

    # Flask-Migrate and Alembic keep revisions in 'versions', beside an 'env.py' that we
    # must not run; the predecessor keeps them in the folder itself.
    own = os.path.join(home, "versions") if _is_nested(home) else home
    found: list[tuple[str | None, str]] = [(None, own)]

    for item in _as_list(value):
        match item:
            case [str(branch), path]:
                found.append((branch, _folder(root, path, key)))
            case _:
                found.append((None, _folder(root, item, key)))

    return found


def _is_nested(home: str) -> bool:
    """Whether the revisions are in ``versions``, as Alembic lays them out."""
    if not os.path.isdir(os.path.join(home, "versions")):
        return False

    files = {name for name in os.listdir(home) if name.endswith(".py")}
    return files <= {"__init__.py"} or "env.py" in files


def _time_zone(name: str) -> None:
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(name)
    except KeyError:
        ZoneInfo(name.upper())  # as Alembic does


#: What fails for a value over which Alembic would stumble.
_TRIALS: t.Final[dict[str, cabc.Callable[[str], t.Any]]] = {
    "truncate_slug_length": int,
    "output_encoding": "".encode,
    "timezone": _time_zone,
}


def _try_values(settings: _Settings, *keys: str) -> None:
    """Refuse what cannot be used, where it would be."""
    for key in keys:
        try:
            if value := settings.sections[""].get(key):
                _TRIALS[key](value)
        except (ValueError, LookupError) as error:
            raise FlaskAlembicError(
                f"ALEMBIC['{key}'] cannot be used: {error}."
            ) from error


def _alembic_config(settings: _Settings) -> Config:
    """Alembic's own configuration object, holding the settings."""
    from alembic.config import Config

    _try_values(settings, "truncate_slug_length")
    config = Config()

    for section, options in settings.sections.items():
        for key, value in options.items():
            try:
                config.set_section_option(section or "alembic", key, value)
            except ValueError as error:
                raise FlaskAlembicError(
                    f"ALEMBIC['{section or key}'] cannot be used: {error}."
                ) from error

    return config


def _with_x(config: Config, x: list[str] | None) -> Config:
    """The configuration with the arguments for ``context.get_x_argument()``."""
    import copy
    from argparse import Namespace

    if x:
        config = copy.copy(config)
        config.cmd_opts = Namespace(x=x)

    return config


def _x_list(x: XArguments) -> list[str]:
    """Arguments as Alembic's command line has them: a list of ``KEY=VALUE``."""
    if isinstance(x, cabc.Mapping):
        return [f"{key}={value}" for key, value in x.items()]

    return _as_list(x)


def _own_options(name: str) -> dict[str, t.Any]:
    """The ``configure`` options of one database: the common ones, then its own."""
    options = dict(_config_dict(current_app, "ALEMBIC_CONTEXT"))

    if isinstance(options.get(name, ""), dict | None):
        options |= options.pop(name) or {}

    _check("ALEMBIC_CONTEXT", options)
    # An empty schema, as from an environment variable, is none.
    options["version_table_schema"] = options.get("version_table_schema") or None
    return options


def _options(
    extension: Alembic, name: str, connection: sa.Connection | None = None
) -> dict[str, t.Any]:
    """All ``configure`` options of one database, with our defaults and hooks."""
    import inspect

    from alembic.runtime.environment import EnvironmentContext

    targets = extension._scope().base.targets(extension)
    options = _own_options(name)
    named = inspect.signature(EnvironmentContext.configure).parameters
    known = {*named, *_KINDS} - _OURS
    dialects = {each.engine.dialect.name for each in targets.values()} | _DIALECTS

    for key, value in [*options.items()]:
        is_name = key in targets or key in extension.engines

        if is_name and isinstance(value, dict | None):
            del options[key]  # another database's own
        elif key not in known and key.partition("_")[0] not in dialects:
            raise FlaskAlembicError(
                f"ALEMBIC_CONTEXT has '{key}', which is neither an option of Alembic's"
                " 'configure' that you can set, nor a database: there are"
                f" {_quoted(targets)}."
            )

    if targets[name].engine.dialect.name == "sqlite":
        # SQLite can alter little in place, and does roll DDL back when it is asked to.
        options.setdefault("render_as_batch", True)
        options.setdefault("transactional_ddl", True)

    if len(targets) > 1:
        options["upgrade_token"], options["downgrade_token"] = _tokens(extension, name)

    options.setdefault("target_metadata", targets[name].metadata)
    options["database_name"] = name

    if hook := options.get("process_revision_directives"):
        options["process_revision_directives"] = _keeping_scripts(hook)

    return _autogenerate_hooks(
        options,
        exclude=extension._get_cache().settings.exclude_tables,
        version_table=options.get("version_table", "alembic_version"),
        version_table_schema=options.get("version_table_schema"),
        connection=connection,
    )


# -- Engines and metadata --------------------------------------------------------------


class _Target(t.NamedTuple):
    """One database: its name, its (sync side of the) engine, its metadata."""

    name: str
    engine: sa.Engine
    metadata: list[sa.MetaData]

    @property
    def is_async(self) -> bool:
        return self.engine.dialect.is_async

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells this database from others, as far as the URL says."""
        url, kind = self.engine.url, self.engine.dialect.name
        path, query = url.database or "", url.query

        if kind == "sqlite":
            path = path.removeprefix("file:").partition("?")[0]

            if path not in ("", ":memory:") and query.get("mode") != "memory":
                return kind, os.path.realpath(path)
        elif path or url.host or "host" in query:
            host = (url.host or str(query.get("host", ""))).lower()
            host = "127.0.0.1" if host in ("localhost", "::1", "") else host
            kind = "mysql" if kind in _MYSQL else kind
            usual = {"mysql": 3306, "postgresql": 5432}.get(kind, "")
            port = url.port or query.get("port") or usual
            return kind, host, str(port), path, str(query.get("options", ""))

        # In memory, or an engine with a 'creator', whose URL tells nothing.
        return kind, str(id(self.engine))


def _quoted(names: cabc.Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _by_name(given: t.Any) -> dict[str, t.Any]:
    """An argument as a dict: what is no dict belongs to the ``default`` database."""
    if given is None:
        return {}

    return dict(given) if isinstance(given, cabc.Mapping) else {"default": given}


def _as_list(value: t.Any) -> list[t.Any]:
    if value is None:
        return []

    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]


def _find_targets(
    metadatas: cabc.Mapping[str, MetadataOption],
    engines: cabc.Mapping[str, EngineOption],
) -> dict[str, _Target]:
    """The databases to migrate: those that the metadata name. Arguments win."""
    db = current_app.extensions.get("sqlalchemy")

    if not metadatas:
        # Flask-SQLAlchemy has it; Flask-SQLAlchemy-Lite leaves models to the
        # application.
        metadata = getattr(db, "metadata", None)

        if not isinstance(metadata, sa.MetaData):
            raise FlaskAlembicError(
                "No metadata found: unless Flask-SQLAlchemy has it, pass 'metadatas'"
                " when making the 'Alembic' extension."
            )

        metadatas = {"default": metadata}

    found: dict[str, t.Any] = dict(engines)

    if not found.keys() >= metadatas.keys():
        # A sync engine goes before an async one.
        for attribute in ("engines", "async_engines"):
            for name, engine in (getattr(db, attribute, None) or {}).items():
                found.setdefault("default" if name is None else name, engine)

    if not found:
        raise FlaskAlembicError(
            "No engine found: use Flask-SQLAlchemy or Flask-SQLAlchemy-Lite with"
            " engines configured, or pass 'engines' when making the 'Alembic'"
            " extension."
        )

    if missing := metadatas.keys() - found.keys():
        raise FlaskAlembicError(
            f"Missing engine config{'s' * (len(missing) > 1)} for {_quoted(missing)}:"
            " each key of 'metadatas' needs an engine, in 'engines' or in the"
            " configuration of Flask-SQLAlchemy(-Lite)."
        )

    targets = {}

    for name, given in metadatas.items():
        metadata = _as_list(given)
        engine = getattr(found[name], "sync_engine", found[name])

        # A base class in place of its metadata is a common slip.
        if (
            not metadata
            or any(not isinstance(each, sa.MetaData) for each in metadata)
            or not isinstance(engine, sa.Engine)
        ):
            raise FlaskAlembicError(
                f"Database '{name}' needs a MetaData or a list of them, and an engine;"
                f" not {given!r} and {engine!r}."
            )

        targets[name] = _Target(name, engine, metadata)

    return targets


def _check_version_tables(targets: dict[str, _Target]) -> None:
    """Refuse two databases that are one: each would overwrite the other's version."""
    seen: dict[tuple[t.Any, ...], str] = {}

    for name, target in targets.items():
        options, identity = _own_options(name), target.identity
        usual = "public" if identity[0] == "postgresql" else None
        schema = options.get("version_table_schema") or usual
        table = options.get("version_table", "alembic_version")
        other = seen.setdefault((identity, schema, table), name)

        if other != name:
            raise FlaskAlembicError(
                f"The databases '{other}' and '{name}' are the same, with the same"
                f" version table '{table}': give one of them its own 'version_table' or"
                " 'version_table_schema' in ALEMBIC_CONTEXT."
            )


def _select(targets: dict[str, _Target], names: DatabaseNames) -> dict[str, _Target]:
    """The targets that were asked for, in their own order."""
    if names is None:
        return targets

    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [str(name) for name in wanted if name not in targets]

    if unknown or not wanted:
        raise _command_error(
            f"There is no database {_quoted(unknown) or 'asked for'}; there are"
            f" {_quoted(targets)}."
        )

    return {name: target for name, target in targets.items() if name in wanted}


def _primary(names: cabc.Iterable[str]) -> str:
    """The database that is meant where one answer is asked for."""
    names = list(names)

    if len(names) == 1:
        return names[0]

    if "default" in names:
        return "default"

    raise FlaskAlembicError(
        f"Several databases, none named 'default': name one of {_quoted(names)}."
    )


# -- Environment -----------------------------------------------------------------------
# Every migration goes through _Run, one for each database: live, async, only a dialect.
# Alembic's private names are touched in this room only.

#: Alembic's ``op`` and ``context`` are global to the process, so runs take turns.
_RUN_LOCK: t.Final = threading.RLock()
_running: t.Final[ContextVar[bool]] = ContextVar("flask_alembic_running", default=False)
_looping: t.Final[ContextVar[bool]] = ContextVar("flask_alembic_looping", default=False)


@contextlib.contextmanager
def _connect(target: _Target) -> cabc.Generator[sa.Connection]:
    """A connection, given back to its pool in the end."""
    engine: t.Any = target.engine
    pool, options = engine.pool, engine.get_execution_options()

    while proxied := getattr(engine, "_proxied", None):
        # SQLAlchemy 2.0 takes no listeners on a connection of an engine with options.
        engine = proxied

    with contextlib.ExitStack() as stack:
        try:
            if isinstance(pool, sa.StaticPool):
                # Giving it back rolls back what the application has open: look first.
                record: t.Any = pool.connection
                _refuse_transaction(target.name, record.driver_connection)

            if target.is_async and not isinstance(
                pool, (sa.StaticPool, sa.SingletonThreadPool)
            ):
                # A connection belongs to its event loop: the application's pool must
                # never hold one of ours.
                pool = pool.recreate()
                stack.callback(pool.dispose)
                connection = sa.Connection(engine, pool.connect())
            else:
                connection = engine.connect()

            stack.callback(connection.close)
            connection = connection.execution_options(**options)

            if isinstance(pool, sa.SingletonThreadPool):
                # The same connection as the application's, in this thread.
                driver = connection.connection.driver_connection
                _refuse_transaction(target.name, driver)
        except FlaskAlembicError:
            raise
        except Exception as error:
            error.__dict__[_ORIGIN] = "connect"
            cause = " ".join(str(getattr(error, "orig", None) or error).split())
            address = engine.url.render_as_string(hide_password=True)
            error.add_note(
                f"Cannot connect to database '{target.name}' ({address}):"
                f" {cause or type(error).__name__}"
            )
            raise

        yield connection


def _refuse_transaction(name: str, driver_connection: t.Any) -> None:
    if getattr(driver_connection, "in_transaction", False) and (
        getattr(driver_connection, "autocommit", True) is not False
    ):
        raise FlaskAlembicError(
            f"The application has a transaction open on the one connection of database"
            f" '{name}': commit it or roll it back before migrating."
        )


def _name_of(context: MigrationContext) -> str:
    """The database of a context; a subclass may have made one without saying."""
    return str(context.opts.get("database_name", "default"))


@contextlib.contextmanager
def _left_as_found(connection: t.Any) -> cabc.Generator[None]:
    """End the transaction that reading begins, but not one that was open before."""
    began = not connection.in_transaction()

    try:
        yield
    finally:
        if began and connection.in_transaction():
            connection.rollback()


def _in_loop(fn: cabc.Callable[[], _R]) -> _R:
    """Call a synchronous function where an async driver can be awaited."""
    import asyncio
    from importlib.util import find_spec

    from sqlalchemy.util import greenlet_spawn

    if _looping.get():
        return fn()

    if find_spec("greenlet") is None:
        raise FlaskAlembicError(
            "An async engine needs greenlet: run \"pip install 'sqlalchemy[asyncio]'\"."
        )

    async def spawn() -> _R:
        _looping.set(True)
        return await greenlet_spawn(fn)

    def run() -> _R:
        # With a factory, it leaves the thread's own event loop alone.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            try:
                return runner.run(spawn())
            except KeyboardInterrupt as error:
                # Raised in place of the cancellation, which has the note.
                for note in getattr(error.__context__, "__notes__", ()):
                    error.add_note(note)

                raise

    # The public function raises, which would be the context of every error in 'fn'.
    if asyncio._get_running_loop() is None:  # noqa: SLF001
        return run()

    # That loop is busy with the caller: work in a thread that has a loop of its own.
    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(copy_context().run, run).result()


def _title(script: Script) -> str:
    return f"Revision '{script.revision}' ('{script.path}')"


def _script_signature(script: ScriptDirectory) -> t.Any:
    """What changes when a revision file is added, removed or changed."""
    # No public name tells the resolved version locations.
    locations: t.Any = script._version_locations  # noqa: SLF001
    return _signature(locations, script.recursive_version_locations)


def _load_scripts(config: Config) -> tuple[ScriptDirectory, t.Any]:
    """Load the revision files, and refuse those that form no history."""
    from traceback import walk_tb

    from alembic.script import ScriptDirectory
    from alembic.script import revision

    home = config.get_main_option("script_location") or ""

    if ":" not in home and not os.path.isdir(home):
        raise FlaskAlembicError(
            f"There is no migrations folder '{home}': set ALEMBIC['script_location'] or"
            " run 'flask db mkdir'."
        )

    script = ScriptDirectory.from_config(config)
    # Alembic tells on stdout about each file that it writes; only commands print.
    quiet: t.Any = {"quiet": True}
    script.messaging_opts = quiet
    signature = _script_signature(script)

    try:
        loaded = list(script._load_revisions())  # noqa: SLF001
    except Exception as error:
        # Alembic does not tell the file, but the frame that was loading it has it.
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        paths = [f.f_locals["path"] for f in frames if f.f_code.co_name == "_from_path"]
        raise FlaskAlembicError(
            f"The revision file '{' '.join(map(str, paths))}' cannot be loaded:"
            f" {type(error).__name__}: {error}"
        ) from error

    known = {each.revision: each for each in loaded}

    for each in loaded:
        # Alembic only warns of these two.
        if (other := known[each.revision]) is not each:
            raise FlaskAlembicError(
                f"Two files have the revision id '{each.revision}': '{each.path}' and"
                f" '{other.path}'."
            )

        if missing := {*_as_list(each.down_revision)} - known.keys():
            raise _command_error(
                f"{_title(each)} follows {_quoted(missing)}, which no file has."
            )

    script.revision_map = revision.RevisionMap(lambda: iter(loaded))

    try:
        script.get_heads()
    except revision.RevisionError as error:
        raise _command_error(f"The revision files form no history: {error}") from error
    except KeyError as error:
        message = f"A dependency on {error} fits no revision file."
        raise _command_error(message) from error

    return script, signature


def _identifiers(target: RevisionTarget) -> str | tuple[str, ...]:
    """A target as Alembic takes it: an id or symbol, or several."""
    target = getattr(target, "revision", target)

    if isinstance(target, (str, int)) and not isinstance(target, bool) and target != "":
        return str(target)

    if isinstance(target, (list, tuple, set, frozenset)) and target:
        return tuple(str(_identifiers(each)) for each in target)

    raise _command_error(f"{target!r} is no revision.")


@contextlib.contextmanager
def _explained_heads() -> cabc.Generator[None]:
    """Make Alembic's "multiple heads" say which, and what to type."""
    from alembic.script.revision import MultipleHeads
    from alembic.util import CommandError

    try:
        yield
    except CommandError as error:
        if isinstance(error.__cause__, MultipleHeads):
            raise _several_heads(error.__cause__.heads) from error

        raise


def _several_heads(heads: cabc.Iterable[str]) -> Exception:
    names = sorted(heads)
    return _command_error(
        f"There are several heads: {', '.join(names)}. Name one, take 'heads' for all,"
        f' or merge them: flask db merge -m "merge heads" {" ".join(names)}'
    )


@_explained_heads()
def _make_steps(
    kind: str, script: ScriptDirectory, target: t.Any, rows: _Heads
) -> list[t.Any]:
    # Alembic's commands make theirs so; no public function does.
    return list(getattr(script, f"_{kind}_revs")(target, rows))


_upgrade_steps: t.Final = functools.partial(_make_steps, "upgrade")


def _scripts(script: ScriptDirectory, names: t.Any) -> list[Script]:
    """The revisions of some names; Alembic's types hide that ``base`` has none."""
    found = t.cast("tuple[Script | None, ...]", script.get_revisions(names))
    return [each for each in found if each is not None]


def _unknown(script: ScriptDirectory, rows: _Heads) -> tuple[str, ...]:
    """The ids that no revision file has. A prefix is no id here, nor is a label."""
    known: t.Any = script.revision_map._revision_map  # noqa: SLF001
    return tuple(x for x in rows if getattr(known.get(x), "revision", None) != x)


def _refuse_unknown(script: ScriptDirectory, rows: _Heads, name: str) -> None:
    if unknown := _unknown(script, rows):
        raise _command_error(
            f"Database '{name}' is at {_quoted(unknown)}, which no revision file has."
            " Get the missing file; or go to the branch of the code that has it; or, if"
            " the schema is known to match a revision, run 'flask db stamp --purge"
            " REVISION'."
        )


def _refuse_overlap(script: ScriptDirectory, names: cabc.Sequence[str]) -> None:
    """Refuse revisions of which one leads to another: no command could use both."""
    found = {each.revision for name in names for each in _scripts(script, name)}

    for name in found if len(found) > 1 else ():
        below = {each.revision for each in script.walk_revisions("base", name)}

        if other := (below & found) - {name}:
            raise _command_error(
                f"'{name}' follows {_quoted(other)}: stamp the last of a line only."
            )


class _Steps:
    """The steps that a method asks for. Asking has no effect: it may be done twice."""

    def __init__(
        self,
        extension: Alembic,
        kind: t.Literal["upgrade", "downgrade", "stamp", "ensure-version"],
        target: RevisionTarget,
        start: str = "base",
        purge: bool = False,
    ) -> None:
        self.extension, self.kind, self.target = extension, kind, target
        self.start, self.purge = str(_identifiers(start)), purge

    def __call__(self, rows: t.Any, context: MigrationContext) -> list[t.Any]:
        # Read when the lock is held: the files may have changed while we waited.
        script = context.script = self.extension.script_directory
        rows = tuple(_as_list(rows))
        _refuse_unknown(script, rows, _name_of(context))

        if self.kind == "ensure-version":
            return []

        if self.kind == "stamp":
            target = tuple(_as_list(_identifiers(self.target)))
            _refuse_overlap(script, target)
            return _make_steps("stamp", script, target, rows)

        return _make_steps(self.kind, script, self.resolve(script), rows)

    def resolve(self, script: ScriptDirectory) -> str | tuple[str, ...]:
        """The target, with a count of steps written as Alembic does: ``+1``, ``-1``."""
        target = _identifiers(self.target)

        if isinstance(target, tuple) and self.kind == "downgrade":
            raise _command_error("A downgrade has one target: a revision or 'base'.")

        if isinstance(target, tuple) or not target.isdecimal():
            return target

        # Digits are an id before they are a count; nobody counts to a thousand.
        if len(target) > 3 or target in {s.revision for s in script.walk_revisions()}:
            return target

        # Nor is it a prefix of '0001'.
        if int(target) == 0:
            raise _command_error(f"'{target}' is neither a revision nor a count.")

        return f"{'-' if self.kind == 'downgrade' else '+'}{int(target)}"

    def is_relative(self, script: ScriptDirectory) -> bool:
        """Whether the target counts from where the database stands."""
        target = self.resolve(script)
        return isinstance(target, str) and target.rpartition("@")[2][:1] in ("+", "-")


def _pending(extension: Alembic, steps: _Steps) -> dict[str, bool]:
    """Which databases have something to do; nothing is locked or written."""
    found = {}

    for name, context in extension.migration_contexts.items():
        with _left_as_found(context.connection):
            if steps.kind == "ensure-version":
                # Reading the heads does not tell an empty table from a missing one.
                found[name] = not context._has_version_table()  # noqa: SLF001
            else:
                rows = context.get_current_heads()
                found[name] = steps.purge or bool(steps(rows, context))

    return found


def _nothing(*_: t.Any, **__: t.Any) -> None:
    """Stand in for what must not be done."""


class _OvertakenError(FlaskAlembicError):
    """Another process migrated the database between two transactions of ours."""


class _Run:
    """One run on one database; without a connection, it writes SQL to ``output``."""

    def __init__(
        self,
        extension: Alembic,
        scope: _Scope,
        target: _Target,
        fn: StepFunction,
        connection: sa.Connection | None = None,
        start: t.Any = None,
    ) -> None:
        import io

        from alembic.runtime.environment import EnvironmentContext

        self.name, self.fn, self.connection = target.name, fn, connection
        self.names = scope.base.names(extension)
        self.ran: list[Script] = []
        #: The step that is running, or that failed.
        self.step: RevisionStep | None = None
        self.commits: list[sa.Connection] = []
        self.output = io.StringIO()
        options = _options(extension, target.name)
        dialect_name = target.engine.dialect.name
        given: dict[str, t.Any] = {"fn": self._steps, "tag": scope.tag}

        if isinstance(fn, _Steps):
            given.update(purge=fn.purge, destination_rev=_identifiers(fn.target))

        # SQLite's lock is its transaction, so it is given up between two of them.
        self._rechecks = (
            connection is not None
            and dialect_name == "sqlite"
            and options.get("transaction_per_migration", False)
        )
        self._rows: frozenset[str] = frozenset()

        if self._rechecks:
            hooks = _as_list(options.get("on_version_apply"))
            options["on_version_apply"] = [*hooks, self._applied]

        if connection is None:
            given["as_sql"] = True
            # Other parameter styles would double the percent signs in the script.
            dialect_opts = {"paramstyle": "named", **options.get("dialect_opts", {})}
            options.update(url=target.engine.url, dialect_opts=dialect_opts)
            options.update(output_buffer=self.output, literal_binds=True)
            options["starting_rev"] = start

        config = _with_x(extension.config, scope.x)
        script = extension.script_directory
        self.environment = EnvironmentContext(config, script, **given)
        self.environment.configure(connection=connection, **options)
        self.context = self.environment.get_context()

        if connection is None:
            # Alembic 1.16 drops the table when no revision is left, even a new table.
            table: t.Any = self.context._version  # noqa: SLF001
            table.drop = _nothing

            if dialect_name == "postgresql":
                # SQLAlchemy < 2.1 doubles backslashes until it has seen a server's
                # setting, 'standard_conforming_strings = on' since PostgreSQL 9.1.
                dialect: t.Any = self.context.dialect
                dialect._backslash_escapes = False  # noqa: SLF001

    def migrate(self, kwargs: dict[str, t.Any]) -> None:
        with self.environment, _colons_kept():
            self.environment.run_migrations(**kwargs)

    def call(self, step: RevisionStep, fn: t.Any, kwargs: dict[str, t.Any]) -> None:
        """Call the function of a revision, unless it is for other databases only."""
        arguments = _arguments(step, self.name, self.names)

        if arguments is None:
            return

        result = fn(**kwargs, **arguments)

        if hasattr(result, "close") and hasattr(result, "send"):
            result.close()
            raise TypeError(
                f"'{_direction(step)}' is async or a generator: nothing of it has run."
                " Alembic calls plain functions; 'op.run_async' is for others."
            )

    def _steps(self, rows: t.Any, context: MigrationContext) -> cabc.Iterator[_Step]:
        """The steps, reporting each as it starts and as it is done."""
        self._rows = frozenset(_as_list(rows))
        steps: list[t.Any] = list(self.fn(rows, context))
        report = _progress.get() or _nothing

        if isinstance(self.fn, _Steps) and self.fn.kind == "ensure-version":
            # As each step is: committed here where a run has no transaction as a whole.
            with context.begin_transaction(_per_migration=True):
                context._ensure_version_table()  # noqa: SLF001

        for number, step in enumerate(steps, 1):
            if (revision := getattr(step, "revision", None)) is None:  # a stamp
                yield step
                continue

            run = functools.partial(self._execute, step, step.migration_fn)
            step.migration_fn = functools.update_wrapper(run, step.migration_fn)
            self.step, began = step, time.monotonic()
            total, up = len(steps), step.is_upgrade
            progress = _Progress(self.name, revision, up, number, total, None)
            report(progress)
            yield step
            # Alembic asks for the next step when this one is in the version table.
            self.step = None
            self.ran.append(revision)
            report(progress._replace(seconds=time.monotonic() - began))

    def _execute(self, step: RevisionStep, fn: t.Any, /, **kwargs: t.Any) -> None:
        if self._rechecks and self._rows != frozenset(self.context.get_current_heads()):
            raise _OvertakenError(
                "Another process migrated the database meanwhile: look where it stands,"
                " and run the command again."
            )

        try:
            try:
                self.call(step, fn, kwargs)
            except SystemExit as error:
                # It would end the command with success, though nothing had run.
                raise RuntimeError("The revision called sys.exit().") from error

            # What Alembic opened: for the run, for the step, after an
            # autocommit_block().
            transaction: t.Any = self.context._transaction  # noqa: SLF001

            if transaction is not None and not transaction.is_active:
                raise FlaskAlembicError(
                    f"{_title(step.revision)} committed or rolled back the migration's"
                    " own transaction, as 'op.get_bind().commit()' or a session's"
                    " 'rollback()' does: what followed would be lost. Use"
                    " 'op.get_context().autocommit_block()' or 'begin_nested()'."
                )
        except BaseException as error:
            error.__dict__.setdefault(_ORIGIN, "revision")
            # What comes of asking where nothing answers.
            words = "NoneType|MockConnection|--sql mode|offline"
            asks = isinstance(error, exc.CompileError) or re.search(words, str(error))

            if self.connection is None and asks:
                raise _command_error(
                    f"{_title(step.revision)} cannot be written as SQL for database"
                    f" '{self.name}': it asks for results, which need a live connection"
                    f" ({_user_message(error)}). It can ask"
                    " 'context.is_offline_mode()'."
                ) from error

            raise

    def _applied(self, *, heads: cabc.Iterable[str], **_: t.Any) -> None:
        self._rows = frozenset(heads)

    def outcome(self) -> str:
        """Where the database stands after a failure, and what to do about it."""
        where = "an unknown revision, as it cannot be read"
        advice = ""

        with contextlib.suppress(Exception), _left_as_found(self.connection):
            where = _quoted(self.context.get_current_heads()) or "base"

        if not self.context.impl.transactional_ddl:
            what = (
                f"{self.context.dialect.name} commits DDL by itself, so what ran stays"
            )

            if self.step is not None:
                advice = (
                    f". Either undo by hand what '{self.step.revision.revision}' did"
                    " before the error and run the command again, or finish it by hand"
                    " and run"
                    f" 'flask db stamp {' '.join(self.step.to_revisions) or 'base'}'"
                )
        elif self.commits:
            what = "what was committed stays, the rest was rolled back"
        else:
            what = "everything was rolled back"

        return f"Database '{self.name}': {what}; it stands at {where}{advice}."


def _direction(step: RevisionStep) -> str:
    return "upgrade" if step.is_upgrade else "downgrade"


def _arguments(
    step: RevisionStep, name: str, names: list[str]
) -> dict[str, str] | None:
    """What to pass to a revision's function for a database; ``None`` not to call it."""
    import inspect

    functions, prefix = vars(step.revision.module), f"{_direction(step)}_"
    parameters = inspect.signature(functions[_direction(step)]).parameters
    sections = {
        key.removeprefix(prefix)
        for key, value in functions.items()
        if key.startswith(prefix) and callable(value)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = "engine_name" in parameters or (
        takes_any and len(names) > 1 and sections & {*names}
    )

    if not named:
        # Written before there was a second database.
        if len(names) == 1 or name == "default":
            return {}

        if "default" in names:
            return None

        raise _command_error(
            f"{_title(step.revision)} is for one database, and none of {_quoted(names)}"
            " is named 'default'."
        )

    if not sections or name in sections:
        return {"engine_name": name}

    if name == "default" and "" in sections:
        # Flask-Migrate gives the default bind an empty name.
        return {"engine_name": ""}

    if sections - {""} <= {*names}:
        # Written before this database existed.
        return None

    raise _command_error(
        f"{_title(step.revision)} has functions for {_quoted(sections)}, but none for"
        f" the database '{name}'. Was it renamed?"
    )


def _run_online(
    extension: Alembic, scope: _Scope, fn: StepFunction, kwargs: dict[str, t.Any]
) -> None:
    """Run steps on a scope's databases: on all or none, as far as they allow."""
    scope.ran.clear()

    if isinstance(fn, _Steps):
        try:
            if not any(_pending(extension, fn).values()):
                return
        except exc.OperationalError as error:
            # SQLite keeps even readers out while another process writes much. The guard
            # waits for it.
            if "database is locked" not in str(error):
                raise

    while True:
        try:
            return _run_once(extension, scope, fn, kwargs)
        except _OvertakenError:
            if not isinstance(fn, _Steps) or fn.is_relative(extension.script_directory):
                raise


def _refuse_nested() -> None:
    """Refuse a run inside a run: Alembic's ``op`` can serve only one of them."""
    if _running.get():
        raise FlaskAlembicError(
            "A migration is running here already: a revision cannot start another."
        )


@contextlib.contextmanager
def _alone() -> cabc.Generator[None]:
    """Have Alembic's ``op`` for one run."""
    _refuse_nested()

    with _RUN_LOCK:
        token = _running.set(True)

        try:
            yield
        finally:
            _running.reset(token)


def _run_once(
    extension: Alembic, scope: _Scope, fn: StepFunction, kwargs: dict[str, t.Any]
) -> None:
    contexts = extension.migration_contexts
    targets = scope.targets(extension)
    settings = extension._get_cache().settings
    # Two applications may name the databases differently: the order is the servers'.
    order = sorted(contexts, key=lambda name: targets[name].identity)
    files = [targets[name].identity for name in order]
    files = [each for each in files if each[0] == "sqlite"]
    runs: dict[str, _Run] = {}
    checks: list[cabc.Callable[[], None]] = []

    if len(set(files)) < len(files):
        raise FlaskAlembicError(
            "Several databases are one SQLite file, which takes one transaction at a"
            " time: migrate them one by one, with 'database' (-n)."
        )

    try:
        # All locks, then all transactions, then the steps; in the end backwards.
        with _alone(), contextlib.ExitStack() as stack:
            for name in order:
                connection: t.Any = contexts[name].connection

                if connection.in_transaction():
                    # What the caller did through the low-level objects; Alembic would
                    # neither begin nor commit where a transaction is open already.
                    connection.commit()

                run = _Run(extension, scope, targets[name], fn, connection)
                runs[name] = run
                checks.append(stack.enter_context(_guard(run, settings)))
                stack.enter_context(_listening(connection, commit=run.commits.append))

            for name in order:
                stack.enter_context(runs[name].environment.begin_transaction())

            for name in contexts:
                runs[name].migrate(kwargs)

            for check in checks:
                check()
    except BaseException as error:
        _explain(error, list(runs.values()))
        raise
    finally:
        scope.ran.update((s.revision, s) for run in runs.values() for s in run.ran)


@contextlib.contextmanager
def _listening(
    connection: t.Any, **listeners: cabc.Callable[..., t.Any]
) -> cabc.Generator[None]:
    """Listen to a connection's events; the pool gets it back without listeners."""
    with contextlib.ExitStack() as stack:
        for name, listener in listeners.items():
            # Only this event may replace what it is given.
            retval = name == "before_cursor_execute"
            event.listen(connection, name, listener, retval=retval)
            stack.callback(event.remove, connection, name, listener)

        yield


def _explain(error: BaseException, runs: list[_Run]) -> None:
    """Add the note that says what failed, and how it left each database."""
    if not any(run.step or run.ran for run in runs):
        return

    lines = ["The migration failed after its revisions ran."]

    for run in runs:
        if (step := run.step) is not None:
            lines = [
                f"{_title(step.revision)} failed in database '{run.name}' while"
                f" {_direction(step).removesuffix('e')}ing."
            ]
            dialect = run.context.dialect.name

            if dialect == "sqlite" and "database is locked" in str(error):
                lines.append(
                    "The migration itself holds SQLite's lock: a revision must write"
                    " through 'op.get_bind()', not through a connection of its own; or"
                    " set 'transactional_ddl' to False in ALEMBIC_CONTEXT."
                )

    error.add_note("\n".join([*lines, *(run.outcome() for run in runs)]))


def _run_offline(
    extension: Alembic, scope: _Scope, steps: _Steps, live: dict[str, _Heads] | None
) -> dict[str, str]:
    """Write the steps as SQL, from where the databases stand or from a given start."""
    script = extension.script_directory
    result = {}

    if live is None:
        _refuse_range(script, steps)

    for name, target in scope.targets(extension).items():
        if live is not None:
            _refuse_unknown(script, live[name], name)

        start = steps.start if live is None else live[name]
        run = _Run(extension, scope, target, steps, start=start)

        with _alone(), run.environment.begin_transaction():
            run.migrate({})

        result[name] = run.output.getvalue()

    return result


@_explained_heads()
def _refuse_range(script: ScriptDirectory, steps: _Steps) -> None:
    """Refuse a range that has no start, or one that does not lead to its target."""
    kind, start = steps.kind, steps.start
    is_relative = kind in ("upgrade", "downgrade") and steps.is_relative(script)

    if start == "base" and (kind == "downgrade" or is_relative):
        raise _command_error(
            f"SQL for {kind} '{steps.target}' needs a start: START:TARGET."
        )

    # Alembic says so itself of a downgrade.
    if kind == "upgrade" and not is_relative:
        target: t.Any = steps.resolve(script)
        above = {each.revision for each in script.walk_revisions("base", target)}

        if not {each.revision for each in _scripts(script, start)} <= above:
            raise _command_error(f"'{start}' is not an ancestor of '{target}'.")


def _version_rows(
    connection: sa.Connection, options: dict[str, t.Any]
) -> list[str] | None:
    """The ids in the version table, sorted, by one query; ``None`` if that fails."""
    if connection.in_transaction():
        return None  # a query that fails would end the caller's transaction

    name = options.get("version_table", "alembic_version")
    schema = options.get("version_table_schema")
    table = sa.table(name, sa.column("version_num"), schema=schema)

    try:
        with _left_as_found(connection):
            return sorted(map(str, connection.scalars(sa.select(*table.c))))
    except exc.DBAPIError:
        return None


def _plan(
    extension: Alembic, scope: _Scope, steps: _Steps
) -> dict[str, list[PlannedStep]]:
    """Read what the steps would do, by operations that only record."""
    result = {}

    for name, rows in extension._rows().items():
        target = scope.targets(extension)[name]
        run = _Run(extension, scope, target, steps, start=rows)

        with _alone(), run.environment:
            result[name] = [_read_step(run, step) for step in steps(rows, run.context)]

    return result


def _read_step(run: _Run, step: RevisionStep) -> PlannedStep:
    from alembic import operations
    from alembic.operations import ops

    drops: list[str] = []
    problem = None
    written = run.output.tell()

    def record(operation: MigrateOperation) -> t.Any:
        if isinstance(operation, (ops.DropTableOp, ops.DropColumnOp)):
            column = getattr(operation, "column_name", None)
            names = (operation.schema, operation.table_name, column)
            kind = "column" if column else "table"
            drops.append(f"{kind} {'.'.join(filter(None, names))}")
        elif isinstance(operation, ops.ExecuteSQLOp):
            drops.extend(_dropped_by(str(operation.sqltext)))
        elif isinstance(operation, ops.CreateTableOp):
            # The revision may insert rows into what it made.
            return operation.to_table(run.context)

        return None

    @contextlib.contextmanager
    def batch(
        table_name: str, schema: str | None = None, *args: t.Any, **kwargs: t.Any
    ) -> cabc.Generator[t.Any]:
        impl: t.Any = types.SimpleNamespace(table_name=table_name, schema=schema)
        recorder: t.Any = operations.BatchOperations(run.context, impl=impl)
        recorder.invoke = record
        yield recorder

    with operations.Operations.context(run.context) as op:
        recorder: t.Any = op
        recorder.invoke, recorder.batch_alter_table = record, batch

        try:
            run.call(step, step.migration_fn, {})
        except Exception as error:
            problem = f"{type(error).__name__}: {_user_message(error)}"

    # Recorded operations write nothing: what is here went through 'op.get_bind()'.
    drops.extend(_dropped_by(run.output.getvalue()[written:]))
    return PlannedStep(step.revision, step.is_upgrade, tuple(drops), problem)


def _dropped_by(sql: str) -> list[str]:
    """What a statement drops, as far as a look at it tells."""
    pattern = r"(?i)\bdrop\s+(table|column)\s+(?:if\s+exists\s+)?([^\s;,]+)"
    return [f"{kind.lower()} {name}" for kind, name in re.findall(pattern, sql)]


# -- Guards ----------------------------------------------------------------------------
# Around a run, one guard for each database: it takes the migration lock, makes SQLite
# atomic, sets the server's timeouts, and leaves the connection as it was.


def _guard(
    run: _Run, settings: _Settings
) -> contextlib.AbstractContextManager[cabc.Callable[[], None]]:
    """Guard one database; gives the check that has to pass before any commit."""
    connection: t.Any = run.connection

    if connection.dialect.name == "sqlite":
        atomic = run.context.impl.transactional_ddl
        return _sqlite_guard(run.name, connection, settings, atomic)

    if connection.dialect.name in ("postgresql", *_MYSQL):
        return _server_guard(run, connection, settings)

    return contextlib.nullcontext(_nothing)


def _wait(
    name: str, timeout: float | None, attempt: cabc.Callable[[], bool], advice: str
) -> None:
    """Try for a lock until it is ours."""
    limit = float("inf") if timeout is None else timeout
    began, pause, telling = time.monotonic(), 0.02, 1.0

    while not attempt():
        waited = time.monotonic() - began

        if waited >= limit:
            raise MigrationLockTimeout(name, waited, advice)

        if waited >= telling:
            telling = waited + 10
            text = "Waiting for the migration lock of database '%s' (%.0f s)."
            _logger.info(text, name, waited)

        # Short and growing: no statement of ours may be open while we wait, since an
        # index that is built concurrently waits for all open statements.
        time.sleep(min(pause, limit - waited))
        pause = min(pause * 1.5, 0.5)


@contextlib.contextmanager
def _server_guard(
    run: _Run, connection: sa.Connection, settings: _Settings
) -> cabc.Generator[cabc.Callable[[], None]]:
    if connection.dialect.name in _MYSQL:
        autocommit = connection.exec_driver_sql("SELECT @@autocommit").scalar() == 1
        connection.rollback()
    else:
        driver = connection.connection.dbapi_connection
        autocommit = getattr(driver, "autocommit", False) is True

    if autocommit:
        # An engine in AUTOCOMMIT has no transaction that could be rolled back.
        level = connection.default_isolation_level
        connection.execution_options(isolation_level=level)

    lock = _server_lock(run, connection, settings.migration_lock_timeout)
    guard = lock if settings.migration_lock else contextlib.nullcontext()

    with guard, _server_timeouts(connection, settings):
        yield _nothing


@contextlib.contextmanager
def _server_lock(
    run: _Run, connection: sa.Connection, timeout: float | None
) -> cabc.Generator[None]:
    """Hold the server's lock, at session level: a transaction would lose it.

    PostgreSQL's advisory locks belong to a database, MySQL's named locks to the server.
    """
    import hashlib

    schema = run.context.version_table_schema
    schema = schema or connection.dialect.default_schema_name or ""
    place = f"flask_alembic:{schema}.{run.context.version_table}"
    digest = hashlib.sha256(place.encode()).hexdigest()
    held = False

    if connection.dialect.name == "postgresql":
        key = int.from_bytes(bytes.fromhex(digest[:16]), signed=True)
        take = f"SELECT pg_try_advisory_lock({key})"
        release = f"SELECT pg_advisory_unlock({key})"
        advice = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    else:
        # At most 64 characters, and compared without case.
        lock = f"'flask_alembic:{digest[:40]}'"
        take, release = f"SELECT GET_LOCK({lock}, 0)", f"SELECT RELEASE_LOCK({lock})"
        advice = f"SELECT IS_USED_LOCK({lock})"

    def attempt() -> bool:
        nonlocal held
        held = True  # for an interrupt that comes just after the lock did

        try:
            held = bool(connection.exec_driver_sql(take).scalar())
            return held
        finally:
            connection.rollback()

    try:
        try:
            _wait(run.name, timeout, attempt, advice)
        except exc.DBAPIError as error:
            # Servers that speak PostgreSQL's protocol may lack the function (42883) or
            # refuse it (0A000): CockroachDB, YugabyteDB, Redshift.
            code = getattr(error.orig, "sqlstate", None)
            code = code or getattr(error.orig, "pgcode", None)

            if code not in ("42883", "0A000"):
                raise

            held = False
            text = "Database '%s' has no advisory locks: migrating without."
            _logger.info(text, run.name)

        yield
    finally:
        if held:
            _restore(connection, lambda: connection.exec_driver_sql(release).scalar())


def _restore(connection: sa.Connection, action: cabc.Callable[[], t.Any]) -> None:
    """Restore a server session; one that cannot be restored must not reach the pool."""
    try:
        connection.rollback()

        # A lost session has taken all with it; SQLAlchemy would open another one.
        if not connection.invalidated:
            action()
            connection.commit()
    except BaseException as error:
        connection.invalidate()

        if not isinstance(error, exc.DBAPIError):
            raise


@contextlib.contextmanager
def _server_timeouts(
    connection: sa.Connection, settings: _Settings
) -> cabc.Generator[None]:
    """Set the session's timeouts, and what they were before afterwards."""
    import math

    # A 0 would switch a timeout off.
    lock, statement = (
        None if seconds is None else max(1, math.ceil(seconds * 1000))
        for seconds in (settings.lock_timeout, settings.statement_timeout)
    )
    wanted: dict[str, t.Any]

    if connection.dialect.name == "postgresql":
        # It shows a value with its unit.
        show, change = "SHOW {}", "SET SESSION {} = '{}'"
        wanted = {"lock_timeout": lock, "statement_timeout": statement}
    else:
        show, change = "SELECT @@SESSION.{}", "SET SESSION {} = {}"
        # Whole seconds: for tables, and for rows.
        whole = lock and math.ceil(lock / 1000)
        wanted = {"lock_wait_timeout": whole, "innodb_lock_wait_timeout": whole}

        if getattr(connection.dialect, "is_mariadb", False):
            wanted["max_statement_time"] = statement and statement / 1000
        else:
            # MySQL knows a limit for SELECT only.
            wanted["max_execution_time"] = statement

    former = {
        key: connection.exec_driver_sql(show.format(key)).scalar()
        for key, value in wanted.items()
        if value is not None
    }

    def set_all(values: dict[str, t.Any]) -> None:
        for key in former:
            connection.exec_driver_sql(change.format(key, values[key]))

    try:
        set_all(wanted)
        connection.commit()
        yield
    finally:
        if former:
            _restore(connection, lambda: set_all(former))


@contextlib.contextmanager
def _sqlite_guard(
    name: str, connection: sa.Connection, settings: _Settings, atomic: bool
) -> cabc.Generator[cabc.Callable[[], None]]:
    """Make SQLite's transaction cover DDL; its ``BEGIN IMMEDIATE`` is the lock.

    A batch operation drops the original table, which would delete its children where
    foreign keys are enforced. The pragma is ignored inside a transaction, so it is
    switched off before, and each commit checks the keys.
    """
    driver: t.Any = connection.connection.dbapi_connection
    _refuse_transaction(name, connection.connection.driver_connection)
    mode, level = getattr(driver, "autocommit", -1), driver.isolation_level
    cursor = driver.cursor()
    enforced = False
    orphans: t.Counter[str] | None = None
    advice = "ask the system which process has the database's file open (fuser, lsof)"

    def is_autocommit() -> bool:
        return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"

    def try_begin() -> bool:
        try:
            cursor.execute("BEGIN IMMEDIATE")
        except Exception as error:
            if "locked" in str(error):
                return False

            raise

        return True

    def begin(_: sa.Connection) -> None:
        nonlocal orphans

        if atomic and not is_autocommit():  # as in an autocommit_block()
            # The end of an autocommit_block() gives the driver its own transactions
            # back.
            driver.isolation_level = None

            if settings.migration_lock:
                patience = _pragma(cursor, "busy_timeout")
                _pragma(cursor, "busy_timeout = 0")

                try:
                    _wait(name, settings.migration_lock_timeout, try_begin, advice)
                finally:
                    _pragma(cursor, f"busy_timeout = {patience}")
            else:
                cursor.execute("BEGIN")

        if enforced and orphans is None:
            # Not sooner: another process that writes much keeps even readers out.
            orphans = _orphans(cursor)

    def execute(*args: t.Any) -> tuple[str, t.Any]:
        # SQLAlchemy's recipe for SQLite has a listener of the engine emit BEGIN.
        begins = atomic and args[2].lstrip()[:5].upper() == "BEGIN"
        return ("SELECT 1" if begins else args[2]), args[3]

    def check() -> None:
        nonlocal orphans

        if orphans is not None:
            _refuse_orphans(name, cursor, orphans)
            orphans = None  # until the next transaction begins

    def commit(_: sa.Connection) -> None:
        try:
            check()
        except FlaskAlembicError:
            # SQLAlchemy has given up its transaction already when this raises.
            driver.rollback()
            raise

    try:
        if mode != -1:
            # Python 3.12's own transaction control knows no BEGIN IMMEDIATE. The one
            # that it has open would have the pragma for foreign keys ignored.
            driver.autocommit = -1
            driver.rollback()

        if is_autocommit():
            connection.execution_options(isolation_level="SERIALIZABLE")

        if enforced := bool(_pragma(cursor, "foreign_keys")):
            _pragma(cursor, "foreign_keys = OFF")

        with _listening(
            connection, begin=begin, commit=commit, before_cursor_execute=execute
        ):
            yield check
    finally:
        connection.rollback()

        # After Ctrl-C inside a statement, the connection is closed: nothing to restore.
        if not connection.invalidated:
            driver.rollback()

            if enforced:
                _pragma(cursor, "foreign_keys = ON")

            driver.isolation_level = level
            cursor.close()

            if mode != -1:
                driver.autocommit = mode


def _pragma(cursor: t.Any, text: str) -> t.Any:
    cursor.execute(f"PRAGMA {text}")
    return (cursor.fetchone() or [None])[0]


def _orphans(cursor: t.Any) -> t.Counter[str] | None:
    """How many rows of each table refer to nothing; ``None`` if SQLite cannot tell."""
    from collections import Counter

    try:
        cursor.execute("PRAGMA foreign_key_check")
    except Exception as error:
        if "foreign key mismatch" in str(error):
            return None  # a key on columns that are not unique

        raise

    return Counter(row[0] for row in cursor.fetchall())


def _refuse_orphans(name: str, cursor: t.Any, before: t.Counter[str]) -> None:
    """Refuse a transaction that adds rows which refer to nothing."""
    now = _orphans(cursor)
    cursor.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    tables = {row[0] for row in cursor.fetchall()}
    renamed = sum(n for table, n in before.items() if table not in tables)

    if now is None:
        what = "a foreign key that refers to columns which are not unique"
    elif (added := now - before).total() > renamed:
        what = f"rows in {_quoted(added)} that refer to rows which do not exist"
    else:
        return

    raise FlaskAlembicError(
        f"The migration would leave {what}. It was not committed: the application"
        f" enforces foreign keys in database '{name}'."
    )


# -- Autogenerate ----------------------------------------------------------------------


def _stock_template(kind: str) -> str:
    """The path of a template that comes with Alembic, found without importing it."""
    import importlib.util

    spec: t.Any = importlib.util.find_spec("alembic")
    folder = os.path.dirname(spec.origin)
    return os.path.join(folder, "templates", kind, "script.py.mako")


def _same_content(*paths: str) -> bool:
    from pathlib import Path

    # However a version control system has ended the lines.
    texts = {Path(path).read_bytes().replace(b"\r\n", b"\n") for path in paths}
    return len(texts) == 1


@_explained_heads()
def _place(
    settings: _Settings,
    script: ScriptDirectory,
    branch: str,
    parent: RevisionTarget,
    label: str | cabc.Sequence[str] | None,
    path: str | os.PathLike[str] | None,
) -> dict[str, t.Any]:
    """Where a new revision goes: its parents, its labels and its folder."""
    labels = _as_list(label)
    known = _branch_labels(script)
    parents = _as_list(_identifiers(parent))

    if parents != ["head"]:
        if branch not in known and branch != "default":
            labels.append(branch)
    elif branch in known:
        parents = [f"{branch}@head"]
    else:
        # A history from elsewhere has no labels: its head is the default branch's.
        heads = script.get_revisions(script.get_heads())
        plain = [s.revision for s in heads if not s.branch_labels]

        if branch != "default" or not plain:
            parents = ["base"]
            labels.append(branch)
        elif len(plain) > 1:
            raise _several_heads(plain)
        else:
            parents = plain

    _refuse_labels(script, labels)
    found = [s.revision for each in parents for s in _scripts(script, each)]
    places = {name: folder for name, folder in settings.branches if name is not None}

    if path is not None and not os.fspath(path):
        raise _command_error("The path of the version location is empty.")

    if path is None:
        folder = places.get(branch, settings.locations[0])
    else:
        folder = places.get(os.fspath(path)) or _folder(settings.root, path, "path")

    return {
        "head": found or "base",
        "branch_label": list(dict.fromkeys(labels)) or None,
        "version_path": folder,
    }


def _branch_labels(script: ScriptDirectory) -> set[str]:
    return {label for s in script.walk_revisions() for label in s.branch_labels}


def _refuse_labels(script: ScriptDirectory, labels: cabc.Iterable[str]) -> None:
    """Refuse names of branches that are taken, or that no target could name."""
    taken = _branch_labels(script) | {s.revision for s in script.walk_revisions()}

    for label in labels:
        if label in taken:
            raise _command_error(f"There is a branch or revision '{label}' already.")

        if label in _SYMBOLS or not re.fullmatch(r"[^\s@:+]+", label):
            raise _command_error(
                f"'{label}' cannot be the name of a branch or revision."
            )


def _generate(
    extension: Alembic,
    scope: _Scope,
    script: ScriptDirectory,
    arguments: dict[str, t.Any],
) -> list[Script]:
    """Write revision files: Alembic's own way, without its printing."""
    from alembic.autogenerate import RevisionContext

    settings = extension._get_cache().settings
    config = _with_x(extension.config, scope.x)
    names = extension._configured_names()

    if len(names) > 1:
        # A subclass may have made the configuration; the template asks for the names.
        config.set_main_option("databases", ", ".join(names))

    revisions = RevisionContext(config, script, arguments)
    compares = arguments["autogenerate"]
    heads = tuple(s.revision for s in script.get_revisions("heads"))
    compared: list[t.Any] = []

    if compares or settings.is_on("revision_environment"):
        for name, context in extension.migration_contexts.items():
            revisions.template_args.update(_own_options(name).get("template_args", {}))

            with _comparing(context):
                if compares:
                    _refuse_comparison(script, context, settings)
                    revisions.run_autogenerate(heads, context)
                    compared.append(revisions._last_autogen_context)  # noqa: SLF001
                else:
                    revisions.run_no_autogenerate(heads, context)

    made = revisions.generated_revisions

    if compares:
        made[:] = [s for s in made if not all(map(_is_empty, s.upgrade_ops_list))]
        _warn_of_unnamed(extension, made)

    for each in made:
        each.message = _escape_message(each.message or "", script.output_encoding)

    given = revisions.template_args
    scripts: list[Script | None] = []

    for each in made:
        revisions.template_args = {**given, **_rendered(each, compared)}

        with _undone(script), _hooked(script):
            scripts.append(revisions._to_script(each))  # noqa: SLF001

    return [each for each in scripts if each is not None]


@contextlib.contextmanager
def _undone(script: ScriptDirectory) -> cabc.Generator[None]:
    """Remove a file that Alembic wrote and could not load: it would break the rest."""
    before = {name[:2] for name in _script_signature(script)}

    try:
        yield
    except FlaskAlembicError:
        raise
    except Exception:
        for folder, name, *_ in _script_signature(script):
            if (folder, name) not in before:
                os.remove(os.path.join(folder, name))

        raise


@contextlib.contextmanager
def _hooked(script: ScriptDirectory) -> cabc.Generator[None]:
    """Keep what Alembic says of post-write hooks from stdout, and say if one fails."""
    if not script.hooks:
        yield
        return

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except OSError as error:
        raise FlaskAlembicError(
            f"The revision file is written, but a post-write hook failed: {error}"
        ) from error


@contextlib.contextmanager
def _comparing(context: MigrationContext) -> cabc.Generator[None]:
    """Let the user's hooks find ``alembic.context``, as in a run of migrations."""
    environment: t.Any = context.environment_context

    if _running.get():
        # Inside a revision, the run's own environment is there, and must stay.
        environment = contextlib.nullcontext()

    with _RUN_LOCK, _left_as_found(context.connection), environment:
        yield


def _is_empty(container: t.Any) -> bool:
    return all(hasattr(op, "ops") and _is_empty(op) for op in container.ops)


def _refuse_comparison(
    script: ScriptDirectory, context: MigrationContext, settings: _Settings
) -> None:
    """Refuse a database that is behind, or models that seem not to be imported."""
    name = _name_of(context)
    rows = context.get_current_heads()
    _refuse_unknown(script, rows, name)

    if count := len(_upgrade_steps(script, "heads", rows)):
        raise _command_error(
            f"Database '{name}' is behind: {count} revision"
            f"{'s are' if count > 1 else ' is'} pending. Run 'flask db upgrade' first."
        )

    if _has_models(_as_list(context.opts["target_metadata"])):
        return

    assert context.connection is not None
    excluded, table = settings.exclude_tables, context.version_table
    found = _user_tables(context.connection, excluded, table)

    if found:
        raise FlaskAlembicError(
            f"The metadata of database '{name}' has no table, but the database has"
            f" {_quoted(found[:5])}{' and more' * (len(found) > 5)}: were the models"
            " imported? To drop all tables, write an --empty revision."
        )


def _warn_of_unnamed(extension: Alembic, scripts: list[MigrationScript]) -> None:
    targets = extension._scope().base.targets(extension)
    sqlite = [name for name, each in targets.items() if each.identity[0] == "sqlite"]
    tokens = {token for name in sqlite for token in _tokens(extension, name)}
    containers: list[t.Any] = [
        ops
        for each in scripts
        for ops in (*each.upgrade_ops_list, *each.downgrade_ops_list)
        if getattr(ops, "upgrade_token", getattr(ops, "downgrade_token", "")) in tokens
    ]

    if tables := _unnamed_constraints(containers):
        _logger.info(
            "SQLite cannot alter a constraint that has no name, as on %s: give the"
            " metadata a naming convention, sa.MetaData(naming_convention=%s).",
            ", ".join(tables),
            _NAMING_CONVENTION,
        )


def _tokens(extension: Alembic, name: str) -> tuple[str, str]:
    """The names under which the template finds a database's operations."""
    prefix = f"{name}_"

    if len(extension._scope().base.names(extension)) == 1:
        prefix = ""
    elif name == "default":
        with contextlib.suppress(OSError):
            template = extension._get_cache().settings.template

            with open(template, encoding="utf-8") as file:
                # Flask-Migrate's own template names the default bind with nothing.
                prefix = "_" if "bind_names" in file.read() else prefix

    return f"{prefix}upgrades", f"{prefix}downgrades"


def _produce(extension: Alembic) -> MigrationScript:
    from alembic.autogenerate import produce_migrations
    from alembic.operations.ops import MigrationScript

    ups: list[t.Any] = []
    downs: list[t.Any] = []

    for name, context in extension.migration_contexts.items():
        with _comparing(context):
            script = produce_migrations(context, context.opts["target_metadata"])

        ups += script.upgrade_ops_list
        downs += script.downgrade_ops_list
        ups[-1].upgrade_token, downs[-1].downgrade_token = _tokens(extension, name)

    both: dict[str, t.Any] = {"upgrade_ops": ups, "downgrade_ops": downs}
    return MigrationScript(rev_id=None, **both)


def _keeping_scripts(hook: t.Any) -> t.Any:
    """A user's hook that may empty the list of scripts, as the usual recipe does.

    Alembic looks into the list again for the next database, so what it emptied stays in
    there, without operations.
    """

    def process(context: t.Any, revision: t.Any, directives: list[t.Any]) -> None:
        scripts = list(directives)
        hook(context, revision, directives)

        if not directives:
            for each in scripts:
                each.upgrade_ops_list[-1].ops.clear()
                each.downgrade_ops_list[-1].ops.clear()

            directives[:] = scripts

    return process


# Alembic's own autogenerate, through its hooks: the user's callable answers first, ours
# is asked when that has no opinion.

#: From SQLAlchemy's documentation, to be pasted into the application.
_NAMING_CONVENTION: t.Final = """\
{
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}"""


def _autogenerate_hooks(
    options: dict[str, t.Any],
    *,
    exclude: cabc.Sequence[str],
    version_table: str,
    version_table_schema: str | None,
    connection: sa.Connection | None = None,
) -> dict[str, t.Any]:
    """A copy of the options of ``EnvironmentContext.configure`` with our hooks."""
    default_schema = connection.dialect.default_schema_name if connection else None
    own = (version_table_schema or default_schema, version_table)
    users: dict[str, t.Any] = {k: v for k, v in options.items() if callable(v)}
    made: set[str] = set()

    def is_foreign(name: str, schema: str | None) -> bool:
        schema = schema or default_schema
        return (schema, name) == own or _is_excluded(name, schema, exclude)

    def include_name(name: str | None, type_: str, parents: t.Any) -> bool:
        user = users.get("include_name")

        if user and not user(name, type_, parents):
            return False

        return type_ != "table" or not is_foreign(name or "", parents["schema_name"])

    def include_object(
        item: t.Any, name: str | None, type_: str, reflected: bool, other: t.Any
    ) -> bool:
        found = item if reflected else other

        if isinstance(found, sa.Table):
            _repair_defaults(t.cast(t.Any, found), connection)

        user = users.get("include_object")

        if user and not user(item, name, type_, reflected, other):
            return False

        table = item if type_ == "table" else getattr(item, "table", None)
        return table is None or not is_foreign(table.name, table.schema)

    def compare_type(context: t.Any, *args: t.Any) -> bool | None:
        user = users.get("compare_type")
        answer: bool | None = user and user(context, *args)
        return _is_type_changed(context, *args[2:]) if answer is None else answer

    def compare_server_default(context: t.Any, *args: t.Any) -> bool | None:
        for column in args[:2]:
            if not isinstance(column.server_default, sa.DefaultClause | None):
                return None  # Computed, Identity: Alembic compares these elsewhere.

        if connection is None:
            _repair_defaults(args[0].table, context.connection)

        user = users.get("compare_server_default")
        answer: bool | None = user and user(context, *args)
        return _is_default_changed(context, *args[:2]) if answer is None else answer

    def process_revision_directives(
        context: t.Any, revision: t.Any, directives: list[t.Any]
    ) -> None:
        if user := users.get("process_revision_directives"):
            user(context, revision, directives)

        for script in directives:
            both = script.upgrade_ops_list[-1:], script.downgrade_ops_list[-1:]

            if context.dialect.name == "postgresql":
                made.update(_make_enums(context.connection, *both[0], *both[1]))
            elif context.dialect.name in _MYSQL:
                for container in (*both[0], *both[1]):
                    _order_drops(container)

    def render_item(type_: str, item: t.Any, context: AutogenContext) -> t.Any:
        user = users.get("render_item")
        code = user(type_, item, context) if user else False

        if code is False and type_ == "type":
            return _render_type(item, context, user, made)

        if code is False and type_ == "server_default":
            return _render_default(item, context)

        return code

    hooks = {**options, "include_name": include_name, "include_object": include_object}
    hooks.update(render_item=render_item)
    hooks.update(process_revision_directives=process_revision_directives)

    for hook in (compare_type, compare_server_default):
        if options.get(hook.__name__, True) is not False:
            hooks[hook.__name__] = hook

    return hooks


def _is_excluded(name: str, schema: str | None, exclude: cabc.Sequence[str]) -> bool:
    """Whether a table is another tool's, or matched by a glob.

    A glob with a dot is matched against the schema and the name, one without against
    the name, whatever its schema.
    """
    return any(
        fnmatch.fnmatchcase(f"{schema}.{name}" if "." in glob else name, glob)
        for glob in ("*alembic_version*", *exclude)
    )


def _repair_defaults(table: sa.Table, connection: sa.Connection | None) -> None:
    """Put right what reflection tells of server defaults."""
    columns: dict[str, t.Any] = {each.name: each for each in table.columns}

    for column in columns.values():
        if type(column.server_default) in (sa.Computed, sa.Identity):
            # Alembic 1.18 and later take its text before they ask the callable.
            column.server_default.arg = sa.text("")

    if not connection or not getattr(connection.dialect, "is_mariadb", False):
        return

    # SQLAlchemy reads MariaDB's SHOW CREATE TABLE, but not what has a space or a quote.
    rows = connection.execute(
        sa.text(
            "SELECT column_name, column_default, extra FROM information_schema.columns"
            " WHERE table_schema = coalesce(:schema, database()) AND table_name = :name"
        ),
        {"schema": table.schema, "name": table.name},
    )

    for name, default, extra in rows:
        column = columns.get(name)

        if column is None or default in (None, "NULL"):
            continue

        if isinstance(column.server_default, sa.DefaultClause | None):
            update = re.search("on update .*", extra)
            text = sa.text("")
            text.text = f"{default} {update[0]}" if update else default
            column.server_default = sa.DefaultClause(text, _reflected=True)


#: The types that a database keeps under another name.
_KEPT_AS: t.Final = {
    "sqlite": ((r"CLOB", "TEXT"), (r"DOUBLE PRECISION", "REAL")),
    "postgresql": ((r"FLOAT\((\d|1\d|2[0-4])\)", "REAL"),),
    "mysql": ((r"REAL|FLOAT\((2[5-9]|[3-5]\d)\)", "DOUBLE"), (r"NATIONAL (.*)", r"\1")),
}


def _is_type_changed(context: MigrationContext, found: t.Any, wanted: t.Any) -> t.Any:
    """False for a type that the database keeps under another name, else no opinion."""
    kept, name = (e.compile(dialect=context.dialect).upper() for e in (found, wanted))
    kept = kept.partition(" CHARACTER SET")[0]
    dialect = context.dialect.name.replace("mariadb", "mysql")
    aliases: set[str] = set()

    for pattern, alias in _KEPT_AS.get(dialect, ()):
        if match := re.fullmatch(pattern, name):
            aliases.add(match.expand(alias))

    if dialect == "mysql" and (match := re.fullmatch(r"(BLOB|TEXT)\((\d+)\)", name)):
        # The smallest that holds so many bytes, or characters of up to four bytes.
        limits = {"TINY": 2**8, "": 2**16, "MEDIUM": 2**24, "LONG": 2**40}

        for size in (int(match[2]), int(match[2]) * (4 if match[1] == "TEXT" else 1)):
            fitting = (kind for kind, limit in limits.items() if size < limit)
            aliases.add(next(fitting) + match[1])

    return False if kept in aliases else None


def _is_default_changed(
    context: MigrationContext, found: sa.Column[t.Any], wanted: sa.Column[t.Any]
) -> bool | None:
    """Compare the default that a column has with the one that its model would make."""
    dialect, connection = context.dialect, context.connection
    compiler: t.Any = dialect.ddl_compiler
    old = t.cast(t.Any, found.server_default)
    old = old and old.arg.text
    new = compiler(dialect, None).get_column_default_string(wanted)

    if new and dialect.paramstyle in ("format", "pyformat"):
        new = new.replace("%%", "%")

    old, new = (None if str(e or "NULL").upper() == "NULL" else e for e in (old, new))

    if old is None or new is None or connection is None:
        return False if old is new else None

    def is_changed(old: str, new: str) -> bool:
        if _sql_key(old, dialect) == _sql_key(new, dialect):
            return False

        before, after = _literal(old, dialect), _literal(new, dialect)

        if before is not None and after is not None:
            # Alembic writes a string without the quotes at its ends, if there are.
            if before in (after, re.sub("^'|'$", "", after)) or (
                _value(before, found.type) == _value(after, found.type)
            ):
                return False

            if dialect.name != "postgresql":
                return True
        elif before is not None or after is not None or "nextval" in old:
            # Today's date is no function, even while the two are equal.
            return True

        if _is_same_sql(connection, old, new, wanted.type):
            return False

        # What has another value each time can be compared as text only, in which the
        # server may have added parentheses.
        both = (_sql_key(sql, dialect) for sql in (old, new))
        keys = {(re.sub("[()]", "", code), strings) for code, strings in both}
        is_volatile = dialect.name != "sqlite" and not _is_same_sql(
            connection, old, old, wanted.type
        )
        return len(keys) > 1 or not is_volatile

    if not is_changed(old, new):
        return False

    # MariaDB's and MySQL's "on update" is part of the default.
    parts = [re.split(r"\s+on update\s+", sql, flags=re.I) for sql in (old, new)]
    return len(parts[0]) != len(parts[1]) or any(map(is_changed, *parts))


_CAST: t.Final = (
    r'(?i)::\s*("[^"]+"|\w+)(\.("[^"]+"|\w+))?(\s+(varying|precision))?'
    r"(\s*\([\d\s,]+\))?(\s+with(out)?\s+time\s+zone)?(\[\d*\])*"
)


def _sql_key(sql: str, dialect: sa.Dialect) -> tuple[str, tuple[str, ...]]:
    """SQL without casts, spaces, case and outer parentheses, and the strings in it."""
    escapes = dialect.name in _MYSQL
    string = r"'(?:[^'\\]|''|\\.)*'" if escapes else r"'(?:[^']|'')*'"
    strings = re.findall(string, sql, re.S)
    code = re.sub(_CAST, "", re.sub(string, "''", sql, flags=re.S))
    code = re.sub(r"\s+", "", code).lower()
    code = re.sub(r"\(\(((?:[^()]|\(\))*)\)\)", r"(\1)", code)

    while code.startswith("("):
        ends = (n for n in range(1, len(code)) if _is_balanced(code[: n + 1]))

        if next(ends, 0) != len(code) - 1:
            break

        code = code[1:-1]

    if escapes:
        strings = [re.sub(r"\\(.)", _unescape, each, flags=re.S) for each in strings]

    return code, tuple(each[1:-1].replace("''", "'") for each in strings)


def _is_balanced(code: str) -> bool:
    return code.count("(") == code.count(")")


def _unescape(match: re.Match[str]) -> str:
    code = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "Z": "\x1a", "'": "''"}
    return code.get(match[1], match[1])


def _literal(sql: str, dialect: sa.Dialect) -> str | None:
    """The text of a string or a number, None for what has to be evaluated."""
    code, strings = _sql_key(sql, dialect)

    if len(strings) == 1 and re.fullmatch(r"\w*''", code):
        return strings[0]

    is_number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false", code)
    return code if is_number and not strings else None


def _value(text: str, type_: sa.types.TypeEngine[t.Any]) -> t.Any:
    """What a column of this type makes of a literal."""
    with contextlib.suppress(NotImplementedError, ValueError, ArithmeticError):
        kind = type_.python_type

        if issubclass(kind, int | float | decimal.Decimal):
            return decimal.Decimal({"false": "0", "true": "1"}.get(text, text))

        if issubclass(kind, datetime.date):
            return datetime.datetime.fromisoformat(text)

        if issubclass(kind, datetime.time):
            return datetime.time.fromisoformat(text)

        if issubclass(kind, uuid.UUID):
            return uuid.UUID(text)

    return text


def _is_same_sql(
    connection: sa.Connection, one: str, other: str, type_: sa.types.TypeEngine[t.Any]
) -> bool:
    """Let the server evaluate two defaults; SQLite keeps each as it was written."""
    dialect = connection.dialect

    if dialect.name == "postgresql":
        name = type_.compile(dialect=dialect)
        one, other = (f"CAST(CAST(({e}) AS {name}) AS text)" for e in (one, other))
        test = f"{one} IS NOT DISTINCT FROM {other}"
    elif dialect.name in _MYSQL:
        test = f"({one}) <=> ({other})"
    else:
        return False

    try:
        # An error must not end the transaction; there is none to end in autocommit.
        autocommit = connection.get_isolation_level() == "AUTOCOMMIT"

        with contextlib.nullcontext() if autocommit else connection.begin_nested():
            return bool(connection.scalar(sa.select(sa.literal_column(test))))
    except exc.DBAPIError:
        return False


def _render_default(item: t.Any, context: AutogenContext) -> str | t.Literal[False]:
    """Keep ``text()`` from taking a colon in a default for a parameter."""
    if not isinstance(item, sa.DefaultClause) or isinstance(item.arg, str):
        return False

    impl = context.migration_context.impl
    text = getattr(item.arg, "text", "") if item.reflected else ""
    text = text or impl.render_ddl_sql_expr(item.arg, is_server_default=True)
    safe = _with_colons(text)
    prefix = context.opts["sqlalchemy_module_prefix"] or ""
    return f"{prefix}text({safe!r})" if safe != text else False


def _order_drops(container: t.Any) -> None:
    """Drop no index that a foreign key needs: MariaDB and MySQL refuse it."""
    from alembic.operations import ops

    dropped = [op for op in container.ops if isinstance(op, ops.DropTableOp)]
    names = {(op.schema, op.table_name) for op in dropped}

    for table in [op for op in container.ops if isinstance(op, ops.ModifyTableOps)]:
        if (table.schema, table.table_name) in names:
            # These go with their table.
            table.ops[:] = [
                op for op in table.ops if not isinstance(op, ops.DropIndexOp)
            ]

        table.ops.sort(
            key=lambda op: (
                not isinstance(op, ops.DropConstraintOp)
                or op.constraint_type != "foreignkey"
            )
        )

        if not table.ops:
            container.ops.remove(table)


def _enum_of(type_: t.Any) -> t.Any:
    """The type that PostgreSQL has to have before a column can have it."""
    type_ = getattr(type_, "item_type", type_)
    type_ = type_.impl if isinstance(type_, sa.TypeDecorator) else type_
    return type_ if isinstance(type_, sa.Enum) and type_.native_enum else None


def _make_enums(connection: t.Any, upgrade: t.Any, downgrade: t.Any) -> set[str]:
    """Make the enums of new columns before them, and drop new enums in the downgrade.

    Alembic makes an enum with each new table, even if it is there, and never else.

    :return: The enums that a table must not make.
    """
    from alembic.operations import ops

    preparer = connection.dialect.identifier_preparer
    found: t.Any = sa.inspect(connection)
    made = {
        _full_name(None if enum["visible"] else enum["schema"], enum["name"])
        for enum in found.get_enums("*")
    }
    new: dict[str, t.Any] = {}

    def visit(op: t.Any) -> None:
        for each in getattr(op, "ops", ()):
            visit(each)

        is_table = isinstance(op, ops.CreateTableOp)
        columns: list[t.Any] = (
            [*op.columns] if is_table else [getattr(op, "column", op)]
        )

        for each in columns:
            enum = _enum_of(getattr(each, "type", getattr(each, "modify_type", None)))
            name = enum and _full_name(enum.schema, enum.name)

            if name and name not in made and not (is_table and name in new):
                new[name] = enum, is_table

    visit(upgrade)
    text: t.Any = sa.String()
    literal: t.Any = text.literal_processor(connection.dialect)

    for name, (enum, is_table) in new.items():
        type_ = preparer.format_type(enum)
        downgrade.ops.append(ops.ExecuteSQLOp(_with_colons(f"DROP TYPE {type_}")))

        if not is_table:
            labels = ", ".join(map(literal, enum.enums))
            create = f"CREATE TYPE {type_} AS ENUM ({labels})"

            if connection.dialect.paramstyle in ("format", "pyformat"):
                create = create.replace("%%", "%")

            upgrade.ops.insert(0, ops.ExecuteSQLOp(_with_colons(create)))
            made.add(name)

    return made


def _with_colons(sql: str) -> str:
    """SQL for ``text()``, which would take a colon for a parameter."""
    return re.sub(r"(?<![:\w\\]):(?=\w)(?!\w+:)", r"\\:", sql)


def _render_type(
    type_: sa.types.TypeEngine[t.Any],
    context: AutogenContext,
    user: t.Any = None,
    made: cabc.Collection[str] = (),
) -> str | t.Literal[False]:
    """The code of a type; False for a plain one of SQLAlchemy's: Alembic knows it.

    :param made: The enums that need not be made again.
    """
    variants: cabc.Mapping[str, t.Any] = getattr(type_, "_variant_mapping", {})
    parts = (type_, getattr(type_, "item_type", type_))
    enum = _enum_of(type_)
    is_made = enum is not None and _full_name(enum.schema, enum.name) in made

    if not variants and not is_made and all(map(_is_sqlalchemys, parts)):
        return False

    def render(part: t.Any) -> str:
        code = user("type", part, context) if user and part is not type_ else False

        if code is False and enum and is_made and not hasattr(part, "item_type"):
            context.imports.add("from sqlalchemy.dialects import postgresql")
            labels = ", ".join(map(repr, enum.enums))
            names = f"name={str(enum.name)!r}, schema={enum.schema!r}"
            return f"postgresql.ENUM({labels}, {names}, create_type=False)"

        return _type_code(part, context, render) if code is False else str(code)

    code = render(type_)

    for dialect, variant in sorted(variants.items()):
        code += f".with_variant({render(variant)}, {dialect!r})"

    return code


def _is_array(type_: t.Any) -> bool:
    return isinstance(type_, sa.ARRAY)


def _is_sqlalchemys(type_: t.Any) -> bool:
    return type(type_).__module__.startswith("sqlalchemy.")


def _type_code(
    type_: t.Any, context: AutogenContext, render: cabc.Callable[[t.Any], str]
) -> str:
    """Code that makes the type, or else what it is made of, or else its bare SQL."""
    prefix: str = context.opts["sqlalchemy_module_prefix"] or ""
    user_prefix: str | None = context.opts["user_module_prefix"]
    dialect = context.migration_context.dialect
    has_variants = bool(getattr(type_, "_variant_mapping", None))

    if _is_array(type_) and _is_sqlalchemys(type_):
        flags = ("as_tuple", "dimensions", "zero_indexes")
        given = [f"{key}={value!r}" for key in flags if (value := getattr(type_, key))]
        return f"{prefix}ARRAY({', '.join([render(type_.item_type), *given])})"

    if user_prefix is not None and not _is_sqlalchemys(type_):
        return f"{user_prefix}{type_!r}"

    # What cannot be made again from its repr(): local to a function, of __main__, with
    # arguments that are not kept, with a repr() that is not code.
    with contextlib.suppress(Exception):
        code, imports = _qualified(type_, prefix)
        scope = {prefix.rstrip("."): sa} if prefix else dict(vars(sa))
        exec("\n".join(imports), scope)
        made = eval(code, scope)

        is_same = isinstance(type_, type(made)) and (
            # With variants, the SQL is perhaps that of another type.
            has_variants or _ddl(type_, dialect) == _ddl(made, dialect)
        )

        if is_same:
            context.imports.update(imports)
            return code

    if isinstance(type_, sa.TypeDecorator):
        return render(type_.load_dialect_impl(dialect))

    return (
        f"type({type(type_).__name__!r}, ({prefix}types.UserDefinedType,), dict("
        f"cache_ok=True, get_col_spec=lambda *_, **kw: {_ddl(type_, dialect)!r}))()"
    )


def _qualified(type_: t.Any, prefix: str) -> tuple[str, set[str]]:
    """The repr() of a type with modules before its names, and their imports."""
    kind, *bases = type(type_).__mro__
    module = kind.__module__
    first = kind.__name__
    imports: set[str] = set()
    tree = ast.parse(repr(type_), mode="eval")

    if module == "__main__":
        raise ImportError(module)

    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue

        name = node.func.id

        if dialect := re.match(r"sqlalchemy\.dialects\.(\w+)", module):
            if name == first:
                # A driver's own class is private, the one that it extends is not.
                names = (base.__name__ for base in (kind, *bases))
                name = next(each for each in names if not each.startswith("_"))

            owner = dialect[1] if hasattr(sys.modules[dialect[0]], name) else ""
            imports.add(f"from sqlalchemy.dialects import {dialect[1]}")
        else:
            is_known = hasattr(sys.modules[module], name) or name == first
            owner = module if is_known and not _is_sqlalchemys(type_) else ""
            name = kind.__qualname__ if name == first else name

        if owner == module:
            imports.add(f"import {module}")

        node.func.id = f"{owner}.{name}" if owner else f"{prefix}{name}"

    return ast.unparse(tree), imports


def _ddl(type_: sa.types.TypeEngine[t.Any], dialect: sa.Dialect) -> str:
    try:
        return type_.compile(dialect=dialect)
    except exc.CompileError:  # A variant for another database.
        return repr(type_)


def _escape_message(message: str, encoding: str) -> str:
    r"""A message as the start of a docstring in three double quotes.

    >>> print(_escape_message('add "name" \\o/', "utf-8"))
    add "name" \\o/
    """

    def escape(match: re.Match[str]) -> str:
        char = match[0]

        if char.isprintable() and char.encode(encoding, "ignore"):
            return char

        # Half of a surrogate pair is shown: Python 3.13 takes none in a docstring.
        slash = "\\" if "\ud800" <= char <= "\udfff" else ""
        return slash + char.encode("unicode_escape").decode()

    # Of several quotes, and at the end, none may join the three that close.
    text = re.sub(r'\\|"(?="|\Z)', r"\\\g<0>", message)
    return re.sub(r"[^\n]", escape, text)


def _has_models(metadatas: cabc.Iterable[sa.MetaData]) -> bool:
    """Whether there is a table to compare with."""
    return any(metadata.tables for metadata in metadatas)


def _user_tables(
    connection: sa.Connection, exclude: cabc.Sequence[str], version_table: str
) -> list[str]:
    """The tables in the default schema that a comparison would look at."""
    schema = connection.dialect.default_schema_name
    return [
        name
        for name in sorted(sa.inspect(connection).get_table_names())
        if name != version_table and not _is_excluded(name, schema, exclude)
    ]


def _unnamed_constraints(
    script_ops: cabc.Iterable[UpgradeOps | DowngradeOps],
) -> list[str]:
    """The tables with a constraint whose name a batch operation would have to know."""
    from alembic.operations import ops

    return sorted(
        {
            _full_name(table.schema, table.table_name)
            for container in script_ops
            for table in container.ops
            if isinstance(table, ops.ModifyTableOps)
            for op in table.ops
            if isinstance(op, ops.AddConstraintOp | ops.DropConstraintOp)
            and not isinstance(getattr(op, "constraint_name", None), str)
        }
    )


def _full_name(*names: str | None) -> str:
    return ".".join(name for name in names if name)


def _differences(diffs: cabc.Iterable[t.Any]) -> list[str]:
    """Alembic's differences in words, a line each."""
    lines: list[str] = []

    for diff in diffs:
        if isinstance(diff, list):
            lines += _differences(t.cast(t.Any, diff))
        else:
            lines.append(" ".join(_in_words(*diff).split()))

    return lines


def _in_words(kind: str, *rest: t.Any) -> str:
    verb, _, noun = kind.partition("_")
    verb = {"remove": "drop", "modify": "change"}.get(verb, verb)

    if verb == "change" and len(rest) == 6:
        names, old, new = rest[:3], *map(_in_sql, rest[4:])
        noun = {"default": "server default"}.get(noun, noun)
        return f"change {noun} of '{_full_name(*names)}' from {old} to {new}"

    if noun == "column" and len(rest) == 3:
        return f"{verb} column '{_full_name(*rest[:2], rest[2].name)}'"

    item = rest[0] if rest else None

    if isinstance(item, sa.Table):
        noun = noun.replace("table_comment", "comment of table")
        text = f" {item.comment!r}" if noun != "table" and verb == "add" else ""
        return f"{verb} {noun} '{_full_name(item.schema, item.name)}'{text}"

    if isinstance(item, sa.Index | sa.Constraint) and item.table is not None:
        noun = item.__visit_name__.replace("foreign_key_constraint", "foreign key")
        noun = noun.replace("table_or_column_", "")
        keys: t.Any = getattr(item, "expressions", getattr(item, "columns", ()))
        columns = ", ".join(getattr(key, "name", None) or str(key) for key in keys)
        name = f"'{item.name}'" if isinstance(item.name, str) else f"({columns})"
        table = _full_name(item.table.schema, item.table.name)
        return f"{verb} {noun.replace('_', ' ')} {name} on '{table}'"

    return f"{kind.replace('_', ' ')} {', '.join(map(repr, rest))}"


def _in_sql(value: t.Any) -> str:
    """Either side of a change, as one would write it."""
    if isinstance(value, sa.DefaultClause):
        value = value.arg if isinstance(value.arg, str) else str(value.arg)

    return repr(value) if isinstance(value, str | sa.Enum) else str(value)


def _rendered(script: t.Any, contexts: cabc.Sequence[t.Any]) -> dict[str, t.Any]:
    """The template's variables with each database's operations in its own dialect.

    Alembic renders those of all databases with the options of the last one, so that
    batches, types and defaults of the others are wrong.
    """
    from alembic.autogenerate import render
    from alembic.operations.ops import MigrationScript

    parts = list(zip(script.upgrade_ops_list, script.downgrade_ops_list, strict=True))
    variables: dict[str, t.Any] = {}
    imports: set[str] = set(script.imports)

    if len(parts) != len(contexts):
        return variables  # A user's hook made this one: Alembic's own way.

    for (upgrade, downgrade), context in zip(parts, contexts, strict=True):
        context.imports = imports
        part = MigrationScript(None, upgrade_ops=upgrade, downgrade_ops=downgrade)

        with warnings.catch_warnings():
            if context.dialect.name == "sqlite":
                # The command line warns of these, with the convention to paste.
                warnings.filterwarnings("ignore", "Autogenerate rendered a drop_constr")

            render._render_python_into_templatevars(context, part, variables)  # pyright: ignore[reportPrivateUsage]  # noqa: SLF001

    script._needs_render = False  # noqa: SLF001
    return {**variables, "imports": "\n".join(sorted(imports))}


@contextlib.contextmanager
def _colons_kept() -> cabc.Generator[None]:
    """Have tables reflected with the colons that are in their defaults.

    SQLAlchemy takes ``:1`` in ``'{"a":1}'`` for a parameter, and a batch operation,
    which makes the table anew from what it reflects, would write NULL in its place.
    """

    def escape(inspector: t.Any, table: t.Any, info: t.Any) -> None:
        if isinstance(info.get("default"), str):
            info["default"] = _with_colons(info["default"])

    event.listen(sa.Table, "column_reflect", escape)

    try:
        yield
    finally:
        event.remove(sa.Table, "column_reflect", escape)


# -- Quick look ------------------------------------------------------------------------
# Most starts have nothing to upgrade, and the text of the revision files says so,
# without importing Alembic or running a file. In any doubt, Alembic is asked.

_IDENTIFIERS: t.Final = {"revision", "down_revision", "branch_labels", "depends_on"}
_BINDS: t.Final = ("STORE_NAME", "DELETE_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")
_CROOKED: t.Final = {*dis.hasjrel, *dis.hasjabs, dis.EXTENDED_ARG}
# What could bind a name, or answer for one, where the bytecode does not show it.
_UNSEEN: t.Final = {"exec", "eval", "globals", "locals", "vars", "setattr", "delattr"}
_UNSEEN.update(("f_globals", "__dict__", "__getattr__", "__setattr__"))


def _quick_heads(locations: cabc.Sequence[str]) -> frozenset[str] | None:
    """Tell which rows the version table holds when nothing is left to upgrade.

    ``None`` means "don't know": Alembic may refuse the files, or use a rule of its own.
    Only what running a file would show (an ``ImportError`` in it) stays unseen.
    """
    import graphlib

    below: dict[str, tuple[str, ...]] = {}
    names = ["", "base", "head", "heads"]  # not for ids: three are targets

    try:
        for path, has_cache in _revision_files(locations):
            found = _read_identifiers(path, has_cache)
            id_, needs = found["revision"], _as_names(found.get("depends_on"))
            below[id_] = _as_names(found["down_revision"]) + needs
            names += (id_, *_as_names(found.get("branch_labels")))

        illegal = {*"".join(below)} & {*"@-+:"}  # fails if an id is no string
        covered = {id_ for ids in below.values() for id_ in ids}
        graphlib.TopologicalSorter(below).prepare()  # fails if there is a loop
    except Exception:  # whatever is wrong, Alembic says it better
        return None

    # A name is there twice, or one of the ids is missing (or is a label or a prefix).
    if illegal or len({*names}) < len(names) or covered - {*below}:
        return None

    return frozenset({*below} - covered)  # dependencies have no row: the "real heads"


def _revision_files(
    locations: cabc.Iterable[str],
) -> cabc.Iterator[tuple[str, bool]]:
    """Find the files that Alembic would load, and whether their bytecode is cached."""
    from importlib.util import cache_from_source

    for location in filter(os.path.exists, locations):
        cache = os.path.dirname(cache_from_source(os.path.join(location, "_.py")))
        has_cache = os.path.isdir(cache)

        for entry in list(os.scandir(location)):
            name = entry.name
            odd = "__pycache__" in location or "\n" in name or name.strip(".") == "py"

            # Alembic goes by the name that a link leads to. Over the other oddities it
            # stumbles, or looks elsewhere.
            if odd or entry.is_symlink():
                raise ValueError(entry.path)

            is_source = name.endswith(".py") and not name.startswith((".#", "__init__"))

            if is_source and not entry.is_dir():
                yield entry.path, has_cache


def _read_identifiers(path: str, has_cache: bool = False) -> dict[str, t.Any]:
    """Read the literals that a file binds to the identifiers: once, at its top level.

    Compiling, with which an import begins, finds each error of syntax, and the bytecode
    shows every place that binds a name. A syntax tree would double the time: it is for
    values that are no constants, or stand behind a jump.
    """
    if has_cache:
        # What Alembic's own import would run, even where it is out of date.
        code = t.cast("types.CodeType", SourceFileLoader(path, path).get_code(path))
    else:
        code = compile(_source(path), path, "exec", dont_inherit=True)

    scopes = [code]

    for scope in scopes:  # grows on the way
        scopes += [each for each in scope.co_consts if isinstance(each, types.CodeType)]
        unseen = _UNSEEN if scope is code else _UNSEEN | _IDENTIFIERS

        # A star import, or more names than the eight bits of an instruction can number.
        if ("*",) in scope.co_consts or len(code.co_names) > 256:
            raise ValueError(path)

        if not unseen.isdisjoint(scope.co_names):
            raise ValueError(path)

    steps, args = code.co_code[::2], code.co_code[1::2]
    wanted = {i: name for i, name in enumerate(code.co_names) if name in _IDENTIFIERS}
    places = [at for at, i in enumerate(args) if i in wanted]
    places = [at for at in places if dis.opname[steps[at]] in _BINDS]
    bound = sorted(wanted[args[at]] for at in places)
    found: dict[str, t.Any] = {}

    if not code.co_exceptiontable and _CROOKED.isdisjoint(steps[: places[-1]]):
        for at in places:
            if dis.opname[steps[at - 1]] == "LOAD_CONST":
                found[wanted[args[at]]] = code.co_consts[args[at - 1]]

    if sorted(found) != bound:
        source = _source(path)

        # Bytecode that is out of date, of which the source tells nothing.
        if has_cache and compile(source, path, "exec", dont_inherit=True) != code:
            raise ValueError(path)

        for node in ast.parse(source).body:
            match node:
                case ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name)):
                    if name in bound and node.value:
                        found[name] = ast.literal_eval(node.value)
                case _:
                    pass

    if sorted(found) != bound:
        raise ValueError(path)

    return found


def _source(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _as_names(value: t.Any) -> tuple[str, ...]:
    """Read none, one or several names, as Alembic does; fail for all but strings."""
    if not isinstance(value, (tuple, list)):
        value = () if value is None else (value,)

    return tuple(each + "" for each in value)


def _signature(
    locations: cabc.Iterable[str], recursive: bool
) -> tuple[tuple[str, str, int, int], ...]:
    """Describe the locations' files, but for caches, so that each change shows."""
    found = []

    for location in locations:
        for folder, folders, files in os.walk(location):
            folders[:] = {*folders} - {"__pycache__"} if recursive else ()

            for name in files:
                if name.endswith((".py", ".pyc", ".pyo")):
                    with contextlib.suppress(OSError):  # gone, or a link to nowhere
                        info = os.stat(os.path.join(folder, name))
                        found.append((folder, name, info.st_mtime_ns, info.st_size))

    return tuple(sorted(found))


# -- Commands --------------------------------------------------------------------------
# Each parses, calls one method, returns what goes to stdout; the rest goes to stderr.
# What a command needs hangs on it, not on the group: one can be mounted elsewhere.

#: Lines, revisions, or revisions with their mark.
_Lines: t.TypeAlias = "cabc.Iterable[str | Script | tuple[Script, str]]"

#: By parameter name: how it is written, what its value is ("*": repeatable), help.
_OPTIONS: t.Final = {
    "message": ("-m/--message", "TEXT", "What the revision does."),
    "empty": ("--empty", "", "Do not compare models and databases."),
    "branch": ("-b/--branch", "BRANCH", "Branch to go on with, or to start."),
    "parent": ("-p/--parent/--head", "REVISION*", "Revision to go on from."),
    "splice": ("--splice", "", "Allow a parent that is not a head."),
    "depend": ("-d/--depend/--depends-on", "REVISION*", "Revision that it needs."),
    "label": ("-l/--label/--branch-label", "LABEL*", "Name for a branch from here on."),
    "path": ("--path/--version-path", "FOLDER", "Version location for the file."),
    "rev_id": ("--rev-id", "ID", "Id of the revision, in place of a new one."),
    "sql": ("--sql", "", "Print the SQL script in place of running it."),
    "plan": ("--plan", "", "Show what would run, and what that drops."),
    "purge": ("--purge", "", "Forget what the version table says, unread."),
    "tag": ("--tag", "TEXT", "Tag for revisions that read it."),
    "x": ("-x/--x-arg", "KEY=VALUE*", "Argument for revisions that read it."),
    "json": ("--json", "", "Print JSON for programs."),
    "check_heads": ("-c/--check-heads", "", "Exit with 1 if an upgrade is pending."),
    "resolve_dependencies": ("--resolve-dependencies", "", "Leave out what is needed."),
    "start": ("--start", "REVISION", "Oldest revision to show."),
    "end": ("--end", "REVISION", "Newest revision to show."),
    "rev_range": ("-r/--rev-range", "A:B", "Short for both."),
    "indicate_current": ("-i/--indicate-current", "", "Fail if none can be marked."),
    "database": ("-n/--database", "NAME*", "Only this database."),
    "quiet": ("-q/--quiet", "", "Show no progress."),
    "verbose": ("-v/--verbose", "", "Show more, and the traceback of an error."),
}
_DEFAULTS: t.Final[dict[str, t.Any]] = {"branch": "default", "parent": ("head",)}


class _Command(click.Command):
    """Makes one line of an error of the user's making, wherever it is mounted."""

    def __init__(self, *args: t.Any, **kwargs: t.Any) -> None:
        super().__init__(*args, **kwargs)

        if self.callback is not None:
            self.callback = t.cast(t.Any, functools.partial(_call, self.callback))

    def make_context(self, info_name: t.Any, *args: t.Any, **extra: t.Any) -> t.Any:
        """Let options come from ``FLASK_…`` in a test runner as in a process."""
        parent: click.Context | None = extra.get("parent")

        if parent is None or parent.auto_envvar_prefix is None:
            above = parent.command_path.split()[1:] if parent else []
            prefix = "_".join(("FLASK", *above, info_name or "db"))
            extra.setdefault("auto_envvar_prefix", prefix)

        return super().make_context(info_name, *args, **extra)


class _Group(_Command, AppGroup):
    """Lists commands in the order they were added, aliases beside their command."""

    command_class: type[click.Command] | None = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: t.Any) -> None:
        names: dict[click.Command, str] = {}

        for name, each in self.commands.items():
            names[each] = f"{names[each]} ({name})" if each in names else name

        limit = max(formatter.width - 6 - max(map(len, names.values())), 20)
        shown = [(names[x], x.get_short_help_str(limit)) for x in names if not x.hidden]

        with formatter.section("Commands"):
            formatter.write_dl(shown)


def _call(callback: cabc.Callable[..., t.Any], *args: t.Any, **kwargs: t.Any) -> t.Any:
    try:
        with _logging(logging.WARNING if kwargs.get("quiet") else logging.INFO):
            return callback(*args, **kwargs)
    except Exception as error:
        if not _is_user_error(error):
            raise

        if kwargs.get("verbose") or get_debug_flag():
            from traceback import format_exception

            click.echo("".join(format_exception(error)), err=True, nl=False)

        raise click.ClickException(_user_message(error)) from error


#: The commands, for applications that mount them under a group of their own.
cli: t.Final[AppGroup] = _Group(
    "db",
    help="Perform database migrations.",
    epilog='\b\nExample:\n  flask db revision "add users"\n  flask db upgrade',
)


def _command(
    name: str, options: str = "", **arguments: str
) -> cabc.Callable[[cabc.Callable[..., _Lines]], click.Command]:
    """Add a command with what _OPTIONS says, and arguments with their defaults."""
    params: list[click.Parameter] = [_argument(*item) for item in arguments.items()]
    params += [_option(option) for option in f"{options} verbose".split()]
    # A target may be "-2".
    settings = {"ignore_unknown_options": "target" in arguments}

    def add(callback: cabc.Callable[..., _Lines]) -> click.Command:
        @functools.wraps(callback)
        def run(verbose: bool, **options: t.Any) -> None:
            given = {k: v for k, v in options.items() if v not in ((), None)}

            for each in callback(_alembic(), **given):
                item, mark = each if isinstance(each, tuple) else (each, "")
                text = item if isinstance(item, str) else _format(item, verbose, mark)
                click.echo(text)

        return cli.command(name, params=params, context_settings=settings)(run)

    return add


def _option(name: str) -> click.Option:
    names, metavar, text = _OPTIONS[name]
    many = metavar.endswith("*")
    return click.Option(
        [*names.split("/"), name],
        is_flag=not metavar,
        multiple=many,
        metavar=metavar.rstrip("*") or None,
        default=_DEFAULTS.get(name, None if metavar else False),
        help=text + " Can be repeated." * many,
        shell_complete=_complete,
    )


def _argument(name: str, default: str) -> click.Argument:
    many = name.endswith("s")
    return click.Argument(
        [name],
        nargs=-1 if many else 1,
        default=(default,) if many else default,
        metavar=f"[{'MESSAGE' if name == 'text' else name.upper()}]" + "..." * many,
        callback=_check_target if name == "target" else None,
        shell_complete=_complete,
    )


def _check_target(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if value.startswith("-") and not value[1:].isdecimal():
        raise click.NoSuchOption(value, ctx=ctx)

    return value


def _complete(ctx: click.Context, param: t.Any, incomplete: str) -> list[t.Any]:
    """Complete names of databases, branches, revisions; with nothing if it cannot."""
    from warnings import catch_warnings

    from click.shell_completion import CompletionItem

    # What is wrong must not be told in the middle of a line that is being typed.
    with contextlib.suppress(Exception, SystemExit), catch_warnings(action="ignore"):
        app = current_app or ctx.ensure_object(ScriptInfo).load_app()

        with app.app_context():
            names = _completions(_alembic(), str(param.metavar).strip("[].S"))
            found = [name for name in names if name.startswith(incomplete)]
            return [CompletionItem(name, help=names[name]) for name in found]

    return []


def _completions(alembic: Alembic, kind: str) -> dict[str, str | None]:
    if kind == "NAME":
        return dict.fromkeys(alembic.databases)

    if kind not in ("BRANCH", "REVISION", "TARGET"):
        return {}

    scripts = alembic.log()
    labels = sorted({label for script in scripts for label in script.branch_labels})

    if kind == "BRANCH":
        return dict.fromkeys(labels)

    symbols = [*(f"{label}@head" for label in labels), "head", "heads", "base"]
    return {script.revision: script.doc for script in scripts} | dict.fromkeys(symbols)


@_command("mkdir")
def _mkdir_command(alembic: Alembic) -> _Lines:
    """Make the migrations folder and its template."""
    alembic.mkdir()
    return ()


@_command(
    "revision",
    "message empty branch parent splice depend label path rev_id x database",
    text="",
)
def _revision_command(
    alembic: Alembic, text: str, message: str = "", **options: t.Any
) -> _Lines:
    """Write a revision file from what changed in the models."""
    if text and message:
        raise click.UsageError("Give the message either as MESSAGE or with '-m'.")

    made = alembic.revision(text or message, **options)

    if not made:
        click.echo("No changes detected.", err=True)

    return [script.path for script in made]


@_command("merge", "message label rev_id splice", revisions="heads")
def _merge_command(alembic: Alembic, **options: t.Any) -> _Lines:
    """Write a revision file that joins several heads."""
    return [alembic.merge(**options).path]


@_command("upgrade", "sql plan quiet tag x database", target="heads")
def _upgrade_command(alembic: Alembic, **options: t.Any) -> _Lines:
    """Run the revisions that lead up to TARGET."""
    return _migrate(alembic, "upgrade", **options)


@_command("downgrade", "sql plan quiet tag x database", target="-1")
def _downgrade_command(alembic: Alembic, **options: t.Any) -> _Lines:
    """Undo the last revision, or all down to TARGET."""
    if options["sql"] and not all(options["target"].partition(":")):
        raise click.UsageError("'--sql' needs START:TARGET here, as 'current:-1'.")

    return _migrate(alembic, "downgrade", **options)


@_command("stamp", "purge sql tag x database", targets="heads")
def _stamp_command(
    alembic: Alembic, targets: tuple[str, ...], purge: bool, sql: bool, **options: t.Any
) -> _Lines:
    """Write TARGETS into the version table, and run nothing."""
    ranges = [_split_range(each, sql) for each in targets]
    wanted = [target for _, target in ranges]

    if sql and purge:
        raise click.UsageError("Give either '--sql' or '--purge'.")

    if not sql:
        return map(_format, alembic.stamp(wanted, purge=purge, **options))

    starts = {start for start, _ in ranges if start} or {"base"}

    if len(starts) > 1:
        raise click.UsageError("Give one START only.")

    return _sql_lines(alembic.stamp_sql(wanted, *starts, **options))


@_command("status", "json database")
def _status_command(alembic: Alembic, json: bool, **options: t.Any) -> _Lines:
    """Show where each database stands, and what is pending."""
    status = alembic.status(**options)

    if not json:
        return [line for item in status.items() for line in _status_lines(*item)]

    from json import dumps

    # The keys are promised.
    data = {
        name: {
            "current": [script.revision for script in state.current],
            "heads": [script.revision for script in state.heads],
            "pending": [
                {"revision": x.revision, "message": _summary(x), "path": x.path}
                for x in state.pending
            ],
            "unknown": list(state.unknown),
        }
        for name, state in status.items()
    }
    return [dumps({"databases": data}, indent=2)]


@_command("current", "check_heads database")
def _current_command(
    alembic: Alembic, check_heads: bool, database: cabc.Sequence[str] = ()
) -> _Lines:
    """Show the revisions that each database is at."""
    found = {name: alembic.current(name) for name in database or alembic.databases}

    for name, scripts in found.items():
        yield from [f"Database: {name}"] if len(found) > 1 else []
        yield from scripts

    if check_heads and alembic.needs_upgrade(database or None):
        raise click.ClickException("Not at the head revisions: run 'flask db upgrade'.")


@_command("check", "database")
def _check_command(alembic: Alembic, database: cabc.Sequence[str] = ()) -> _Lines:
    """Exit with 1 if the models and the databases differ."""
    lines: list[str] = []

    for name in database or alembic.databases:
        if texts := _differences(alembic.compare_metadata(name)):
            behind = len(alembic.status(name)[name].pending)
            note = f" ({_count(behind)} pending)" if behind else ""
            lines += [f"Models and database '{name}'{note} differ:"]
            lines += [f"  {text}" for text in texts]

    for branch, heads in alembic.diverged().items():
        ids = " ".join(script.revision for script in heads)
        lines += [f"Branch '{branch}' has {len(heads)} heads:"]
        lines += [f"  {_format(script)}" for script in heads]
        lines += [f'To merge them: flask db merge -m "merge heads" {ids}']

    yield from lines or ["No changes detected."]

    if lines:
        click.get_current_context().exit(1)


@_command("heads", "resolve_dependencies")
def _heads_command(alembic: Alembic, **options: t.Any) -> _Lines:
    """Show the revisions that no other follows."""
    return alembic.heads(**options)


@_command("branches")
def _branches_command(alembic: Alembic) -> _Lines:
    """Show the revisions that more than one other follows."""
    for script in alembic.branches():
        yield script
        children = alembic.script_directory.get_revisions(sorted(script.nextrev))
        yield from (f"    -> {_format(child)}" for child in children)


@_command("log", "start end rev_range indicate_current database")
def _log_command(alembic: Alembic, indicate_current: bool, **options: t.Any) -> _Lines:
    """Show the history, newest first."""
    database, ends = options.pop("database", None), options.pop("rev_range", None)

    if ends is not None:
        if options or ends.count(":") != 1:
            raise click.UsageError("'-r' takes A:B, in place of '--start' and '--end'.")

        start, _, end = ends.partition(":")
        options = {"start": start or "base", "end": end or "heads"}

    return _marked(alembic, alembic.log(**options), database, indicate_current)


@_command("show", "database", revisions="head")
def _show_command(alembic: Alembic, revisions: t.Any, database: t.Any = None) -> _Lines:
    """Show all about revisions; 'current' is one."""
    scripts = [x for name in revisions for x in _resolve(alembic, name, database)]
    return [_format(x, True, mark) for x, mark in _marked(alembic, scripts, database)]


@_command("edit", revision="head")
def _edit_command(alembic: Alembic, revision: str) -> _Lines:
    """Open the file of a revision in the editor."""
    for script in _resolve(alembic, revision):
        click.edit(filename=script.path)

    return ()


@_command("ensure-version", "sql database")
def _ensure_version_command(alembic: Alembic, sql: bool, **options: t.Any) -> _Lines:
    """Make the version table where it is missing."""
    if sql:
        return _sql_lines(alembic.ensure_version_sql(**options))

    alembic.ensure_version(**options)
    return ()


for _alias, _name in (("init", "mkdir"), ("migrate", "revision"), ("history", "log")):
    cli.add_command(cli.commands[_name], _alias)


def _alembic() -> Alembic:
    """The extension of the current application."""
    if "alembic" not in current_app.extensions:
        raise click.ClickException(
            "The application has no migrations: call 'Alembic(app)' or 'init_app(app)'."
        )

    return t.cast("Alembic", current_app.extensions["alembic"])


def _split_range(target: str, sql: bool) -> tuple[str, str]:
    """Take ``[START:]TARGET`` apart."""
    start, colon, end = target.rpartition(":")

    if not end:
        raise click.UsageError("The target is empty.")

    if colon and not sql:
        raise click.UsageError("START:TARGET is for '--sql'.")

    return start, end


def _migrate(alembic: t.Any, verb: str, target: str, **options: t.Any) -> _Lines:
    """Upgrade or downgrade, or tell what that would do."""
    sql, plan, quiet = (options.pop(name) for name in ("sql", "plan", "quiet"))
    start, target = _split_range(target, sql)

    if sql and plan:
        raise click.UsageError("Give either '--sql' or '--plan'.")

    if sql:
        scripts = getattr(alembic, f"{verb}_sql")(target, start or "base", **options)
        return _sql_lines(scripts)

    if plan:
        plans = getattr(alembic, f"{verb}_plan")(target, **options).items()
        return [line for item in plans for line in _plan_lines(verb, *item)]

    lines = _ProgressLines(len(alembic.databases) > 1)
    token = _progress.set(None if quiet else lines)
    began = time.perf_counter()

    try:
        getattr(alembic, verb)(target, **options)
    finally:
        _progress.reset(token)
        lines.end_line(" failed")

    if not quiet:
        seconds = time.perf_counter() - began
        done = f"{_count(len(lines.done))} {verb}d in {seconds:.2f}s."
        click.echo(done if lines.done else "Nothing to do.", err=True)

    return ()


def _resolve(alembic: Alembic, name: str, database: t.Any = None) -> list[Script]:
    """The revisions that a name stands for; ``current`` asks the databases."""
    if name == "current":
        return list(alembic.current(database))

    return _scripts(alembic.script_directory, _identifiers(name))


def _marked(
    alembic: Alembic, scripts: list[Script], database: t.Any, needed: bool = False
) -> list[tuple[Script, str]]:
    """Mark the current revisions; none without a database, unless needed."""
    try:
        states = alembic.status(database).values()
        current = {each.revision for state in states for each in state.current}
    except Exception as error:
        if needed or not _is_user_error(error):
            raise

        current = set()

    return [(x, " (current)" if x.revision in current else "") for x in scripts]


def _summary(script: Script) -> str:
    """The message in one line; without one, Alembic takes what follows for it."""
    text = " ".join((script.doc or "").split())
    return "" if text.startswith("Revision ID: ") else text


def _format(script: Script, verbose: bool = False, mark: str = "") -> str:
    """A revision as Alembic shows it, whose own mark is state that threads share."""
    if verbose:
        first, _, rest = script.log_entry.partition("\n")
        text = f"{first}{mark}\n{rest}"
    else:
        text = script.cmd_format(False, include_branches=True, include_parents=True)
        text = f"{text}{mark}, {_summary(script)}".removesuffix(", ")

    for names in (script.branch_labels, script.nextrev):
        # Sets: the same history would look different each time.
        text = text.replace(", ".join(names), ", ".join(sorted(names)), 1)

    return text


def _width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    import unicodedata as data

    seen = [char for char in text if not data.combining(char)]
    return len(seen) + sum(data.east_asian_width(char) in "WF" for char in seen)


def _table(rows: list[tuple[str, str]]) -> list[str]:
    """Two columns, however wide the characters."""
    width = max((_width(first) for first, _ in rows), default=0)
    return [f"{a}{' ' * (width - _width(a))}  {b}".rstrip() for a, b in rows]


def _style(text: str, **style: t.Any) -> str:
    """Colour, which Click takes out again where no terminal is."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def _count(number: int, noun: str = "revision") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _sql_lines(scripts: dict[str, str]) -> cabc.Iterator[str]:
    for name, script in scripts.items():
        text = script.rstrip()
        yield f"-- Database: {name}\n\n{text}\n" if len(scripts) > 1 else text


def _plan_lines(verb: str, name: str, steps: list[PlannedStep]) -> cabc.Iterator[str]:
    yield f"{name}: {_count(len(steps)) if steps else 'nothing'} to {verb}"
    rows = _table([(f"  {s.revision.revision}", _summary(s.revision)) for s in steps])

    for step, row in zip(steps, rows, strict=True):
        yield row

        if step.drops:
            yield _style(f"    ! drops {', '.join(step.drops)}", fg="red")

        if step.problem:
            yield _style(f"    ? may drop anything: {step.problem}", fg="yellow")


def _status_lines(name: str, state: DatabaseStatus) -> cabc.Iterator[str]:
    if state.unknown:
        words = _style(_count(len(state.unknown), "unknown id"), fg="red")
    elif state.pending:
        words = _style(f"{_count(len(state.pending))} pending", fg="yellow")
    else:
        words = _style("up to date", fg="green")

    yield f"{name}: {words}"
    kinds = zip(("current", "head", "pending"), state[:3], strict=True)
    rows = [
        (f"  {kind:<7}  {script.revision}", _summary(script))
        for kind, scripts in kinds
        for script in scripts
    ]
    rows += [(f"  unknown  {revision}", "no file has it") for revision in state.unknown]
    yield from _table(rows)


@contextlib.contextmanager
def _logging(level: int) -> cabc.Generator[None]:
    """Show log lines, unless something does already; leave no trace."""
    alembic = logging.getLogger("alembic")
    handlers = [each for x in (alembic, _logger, logging.root) for each in x.handlers]
    # Of Alembic's own, "Detected ..." is shown; "Running ..." is what progress tells.
    shown = ((alembic, alembic.getChild("autogenerate")), (_logger, _logger))
    handler = _StderrHandler()

    with contextlib.ExitStack() as undo:
        # Alembic itself adds one that does nothing.
        if all(isinstance(each, logging.NullHandler) for each in handlers):
            for logger, chatty in shown:
                undo.callback(logger.removeHandler, handler)
                undo.callback(chatty.setLevel, chatty.level)
                logger.addHandler(handler)
                chatty.setLevel(level)

        yield


class _StderrHandler(logging.Handler):
    """Writes to the stderr of the moment, and not into a line of progress."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)

        if record.levelno >= logging.WARNING:
            text = _style(f"{record.levelname.capitalize()}: {text}", fg="yellow")

        if isinstance(progress := _progress.get(), _ProgressLines):
            progress.end_line()

        click.echo(text, err=True)


class _ProgressLines:
    """Begins a line when a revision starts, and ends it with the time that it took."""

    def __init__(self, named: bool) -> None:
        self.named, self.done, self._open = named, set[str](), False

    def __call__(self, step: _Progress) -> None:
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        place = f"{step.number:>3}/{step.total}"
        name = (f"{step.database}  " if self.named else "") + step.revision.revision
        text = f"  {_summary(step.revision)}".rstrip()

        if terminal:
            # A line that wraps could not be written over.
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            room = columns - _width(f"{place}  {name} ... 999.99s ")

            while text and _width(text) > room:
                text = text[:-1]

        if step.seconds is None:
            self.end_line()
            click.echo(f"{place}  {name}{text} ...", err=True, nl=False)
        else:
            if terminal:
                place, name = _style(f"\r{place}", dim=True), _style(name, fg="cyan")

            # Again for colour on a terminal, and where something came between.
            line = f"{place}  {name}{text} ..." if terminal or not self._open else ""
            click.echo(f"{line} {step.seconds:.2f}s", err=True)
            self.done.add(step.revision.revision)

        self._open = step.seconds is None

    def end_line(self, end: str = "") -> None:
        """End a line that waits for its time."""
        if self._open:
            click.echo(end, err=True)
            self._open = False
