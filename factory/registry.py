"""The registry: one row per device and generation, in SQLite; it holds digests and decisions, never a secret."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import JSON, DateTime, String, create_engine, select, update
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from keys.errors import InputError, SecretError, StorageError


class _Table(DeclarativeBase):
    pass


class DeviceRow(_Table):
    """One generation of one device: what it was made from, and what was decided about it."""

    __tablename__ = "devices"

    device_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    fleet_id: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    base_digest: Mapped[str] = mapped_column(String(64))
    adapter_digest: Mapped[str] = mapped_column(String(64))
    manifest_digest: Mapped[str | None] = mapped_column(String(64))
    package: Mapped[str] = mapped_column(String(255))
    reasons: Mapped[list[str]] = mapped_column(JSON)
    updated: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=lambda: datetime.now(UTC))


class Registry:
    """Opens (or creates) ``registry.sqlite``; raises InputError if the file is not a registry."""

    def __init__(self, path: Path) -> None:
        self._engine = create_engine(f"sqlite:///{path}")
        try:
            _Table.metadata.create_all(self._engine)
            with Session(self._engine) as session:
                session.scalars(select(DeviceRow).limit(1)).all()
        except OperationalError as error:
            if "no such" in str(error.orig):  # another program's database
                raise InputError(f"{path} is not a registry of this program ({error.orig}).") from error
            raise StorageError(f"The registry {path} cannot be opened or written ({error.orig}).") from error
        except DatabaseError as error:
            raise InputError(f"{path} is not a registry of this program, or it is damaged.") from error

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with Session(self._engine, expire_on_commit=False) as session:
                yield session
        except OperationalError as error:
            raise StorageError(
                f"The registry cannot be read or written ({error.orig}); free space, run again."
            ) from error

    def record(self, row: DeviceRow) -> None:
        """Insert or replace the row of one device and generation."""
        with self._session() as session, session.begin():
            session.merge(row)

    def supersede(self, device_id: str) -> None:
        """Mark all generations of a device as superseded: its key was rotated."""
        with self._session() as session, session.begin():
            session.execute(update(DeviceRow).where(DeviceRow.device_id == device_id).values(status="superseded"))

    def earlier_generations(self, device_id: str, generation: int) -> int:
        """How many earlier generations of a device were made: each was another try on the same test images."""
        return sum(row.device_id == device_id and row.generation < generation for row in self.devices())

    def check_vault(self, fleet_id: str, generations: Mapping[str, int]) -> None:
        """Raise SecretError if the vault is another fleet's, or older than what was made with it."""
        for row in self.devices():
            if row.fleet_id != fleet_id:
                raise SecretError(f"The vault is of fleet {fleet_id}, but this folder belongs to {row.fleet_id}.")
            if row.generation > generations.get(row.device_id, 1):
                raise SecretError(
                    f"The vault is older than generation {row.generation} of {row.device_id}, which was made already; "
                    "restore its newest copy."
                )

    def devices(self) -> list[DeviceRow]:
        """All rows, by device id and generation."""
        with self._session() as session:
            return list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id, DeviceRow.generation)))
