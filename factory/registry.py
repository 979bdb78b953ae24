"""The registry: one row per device and generation, in SQLite; it holds digests and decisions, never a secret."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import JSON, DateTime, String, create_engine, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from keys.errors import InputError


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
        except DatabaseError as error:
            raise InputError(f"{path} is not a registry of this program, or it is damaged.") from error

    def record(self, row: DeviceRow) -> None:
        """Insert or replace the row of one device and generation."""
        with Session(self._engine) as session, session.begin():
            session.merge(row)

    def devices(self) -> list[DeviceRow]:
        """All rows, by device id and generation."""
        with Session(self._engine, expire_on_commit=False) as session:
            return list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id, DeviceRow.generation)))
