"""The web process: the one route table, and what starts and stops with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route, WebSocketRoute

from apt_jobs.db.engine import Database
from apt_jobs.errors import AptJobsError
from apt_jobs.events.live import LivePublisher
from apt_jobs.job_queue import WakeUpPublisher, make_celery
from apt_jobs.settings import Settings
from apt_jobs.web import pages
from apt_jobs.web.admissions import Admissions
from apt_jobs.web.api import (
    checkpoints,
    clones,
    code,
    comparisons,
    dataset_previews,
    dataset_uploads,
    datasets,
    generation,
    histories,
    job_bulk,
    job_edits,
    job_lists,
    jobs,
    media,
    models,
    operations,
    retention,
    schedules,
    secrets,
    sweeps,
    training,
    webhooks,
)
from apt_jobs.web.api.idempotency import sweep_loop
from apt_jobs.web.api.openapi import openapi_document
from apt_jobs.web.guard import Guard
from apt_jobs.web.live.generation_streams import GenerationStreams
from apt_jobs.web.live.job_socket import refuse_unknown, upgrade_required, watch_job
from apt_jobs.web.live.multiplexed_socket import watch_jobs
from apt_jobs.web.live.streams import LiveStreams
from apt_jobs.web.loops import (
    advance_loop,
    fire_loop,
    fold_loop,
    preempt_loop,
    prune_loop,
    reap_loop,
    retention_loop,
    wake_up_loop,
)
from apt_jobs.web.metrics import Measured, Metrics
from apt_jobs.web.openai import batches as openai_batches
from apt_jobs.web.openai import completions as openai_completions
from apt_jobs.web.openai import embeddings as openai_embeddings
from apt_jobs.web.openai import files as openai_files
from apt_jobs.web.openai import fine_tuning as openai_fine_tuning
from apt_jobs.web.openai import models as openai_models
from apt_jobs.web.openai.batch_loop import batch_loop
from apt_jobs.web.page_paths import PAGE_PATHS
from apt_jobs.web.problems import ProblemError, on_apt_jobs_error, on_http_exception, on_problem, on_unexpected
from apt_jobs.web.readiness import Readiness
from apt_jobs.web.root_path import RootPath
from apt_jobs.web.service import Service
from apt_jobs.web.submissions import Submissions
from apt_jobs.web.webhook_loop import condition_loop, log_prune_loop, webhook_loop

ROUTES: list[BaseRoute] = [
    Route("/healthz", operations.get_health, methods=["GET"]),
    Route("/readyz", operations.get_readiness, methods=["GET"]),
    Route("/metrics", operations.get_service_metrics, methods=["GET"]),
    Route("/login", operations.log_in, methods=["GET"]),
    Route("/api/logout", operations.log_out, methods=["POST"]),
    Route("/api/jobs", job_lists.get_jobs, methods=["GET"]),
    Route("/api/jobs", jobs.submit_job, methods=["POST"]),
    Route("/api/jobs/cancel", job_bulk.cancel_jobs, methods=["POST"]),
    Route("/api/jobs/pause", job_bulk.pause_jobs, methods=["POST"]),
    Route("/api/jobs/resume", job_bulk.resume_jobs, methods=["POST"]),
    Route("/api/jobs/retry", job_bulk.retry_jobs, methods=["POST"]),
    Route("/api/jobs/delete", job_bulk.delete_jobs, methods=["POST"]),
    Route("/api/jobs/{job_id}", jobs.get_one_job, methods=["GET"]),
    Route("/api/jobs/{job_id}", job_edits.update_job, methods=["PATCH"]),
    Route("/api/jobs/{job_id}", jobs.remove_job, methods=["DELETE"]),
    Route("/api/jobs/{job_id}/clone", clones.clone_job, methods=["POST"]),
    Route("/api/jobs/{job_id}/cancel", jobs.cancel_job, methods=["POST"]),
    Route("/api/jobs/{job_id}/pause", jobs.pause_job, methods=["POST"]),
    Route("/api/jobs/{job_id}/resume", jobs.resume_job, methods=["POST"]),
    Route("/api/jobs/{job_id}/retry", jobs.retry_job, methods=["POST"]),
    Route("/api/jobs/{job_id}/events", jobs.get_events, methods=["GET"]),
    Route("/api/jobs/{job_id}/logs", jobs.get_logs, methods=["GET"]),
    Route("/api/jobs/{job_id}/media", media.get_media, methods=["GET"]),
    Route("/api/jobs/{job_id}/media/{seq}", media.get_media_content, methods=["GET"]),
    Route("/api/jobs/{job_id}/metrics", histories.get_metrics, methods=["GET"]),
    Route("/api/jobs/{job_id}/gradients", histories.get_gradients, methods=["GET"]),
    Route("/api/jobs/{job_id}/gradients/overview", histories.get_gradient_overview, methods=["GET"]),
    Route("/api/jobs/{job_id}/export", histories.export_history, methods=["GET"]),
    Route("/api/compare", comparisons.get_comparison, methods=["GET"]),
    Route("/api/training/history", training.get_history, methods=["GET"]),
    Route("/api/training/gradients", training.get_training_gradients, methods=["GET"]),
    Route("/api/training/status", training.get_status, methods=["GET"]),
    Route("/api/checkpoints", checkpoints.get_checkpoints, methods=["GET"]),
    Route("/api/checkpoints/load", checkpoints.load_checkpoint, methods=["POST"]),
    Route("/api/checkpoints/{checkpoint_id}", checkpoints.get_one_checkpoint, methods=["GET"]),
    Route("/api/checkpoints/{checkpoint_id}", checkpoints.remove_checkpoint, methods=["DELETE"]),
    Route("/api/checkpoints/{checkpoint_id}/download", checkpoints.download_checkpoint, methods=["GET"]),
    Route("/api/generate", generation.generate, methods=["POST"]),
    Route("/api/batch_generate", generation.batch_generate, methods=["POST"]),
    Route("/api/models", models.get_models, methods=["GET"]),
    Route("/api/models/aliases/{alias}", models.put_alias, methods=["PUT"]),
    Route("/api/models/aliases/{alias}", models.delete_alias, methods=["DELETE"]),
    Route("/api/datasets", datasets.get_datasets, methods=["GET"]),
    Route("/api/datasets", datasets.upload_dataset, methods=["POST"]),
    Route("/api/uploads", dataset_uploads.post_upload, methods=["POST"]),
    Route("/api/uploads/{upload_id}", dataset_uploads.get_upload, methods=["GET"]),
    Route("/api/uploads/{upload_id}", dataset_uploads.put_part, methods=["PUT"]),
    Route("/api/uploads/{upload_id}", dataset_uploads.delete_upload, methods=["DELETE"]),
    Route("/api/uploads/{upload_id}/complete", dataset_uploads.complete_upload, methods=["POST"]),
    Route("/api/datasets/{name}", datasets.remove_dataset, methods=["DELETE"]),
    Route("/api/datasets/{name}/preview", dataset_previews.preview_dataset, methods=["GET"]),
    Route("/api/code/{sha256}", code.get_code, methods=["GET"]),
    Route("/api/code/{sha256}", code.upload_code, methods=["PUT"]),
    Route("/api/code/{sha256}/download", code.download_code, methods=["GET"]),
    Route("/api/schedules", schedules.get_schedules, methods=["GET"]),
    Route("/api/schedules", schedules.add_schedule, methods=["POST"]),
    Route("/api/schedules/preview", schedules.preview_schedule, methods=["POST"]),
    Route("/api/schedules/{schedule_id}", schedules.get_one_schedule, methods=["GET"]),
    Route("/api/schedules/{schedule_id}", schedules.replace_schedule, methods=["PUT"]),
    Route("/api/schedules/{schedule_id}", schedules.remove_schedule, methods=["DELETE"]),
    Route("/api/schedules/{schedule_id}/pause", schedules.pause_one_schedule, methods=["POST"]),
    Route("/api/schedules/{schedule_id}/resume", schedules.resume_schedule, methods=["POST"]),
    Route("/api/schedules/{schedule_id}/run", schedules.run_schedule, methods=["POST"]),
    Route("/api/sweeps", sweeps.get_sweeps, methods=["GET"]),
    Route("/api/sweeps", sweeps.add_sweep, methods=["POST"]),
    Route("/api/sweeps/{sweep_id}", sweeps.get_one_sweep, methods=["GET"]),
    Route("/api/sweeps/{sweep_id}/cancel", sweeps.cancel_sweep, methods=["POST"]),
    Route("/api/sweeps/{sweep_id}/pause", sweeps.pause_sweep, methods=["POST"]),
    Route("/api/sweeps/{sweep_id}/resume", sweeps.resume_sweep, methods=["POST"]),
    Route("/api/queues", operations.get_queues, methods=["GET"]),
    Route("/api/queues/{name}", operations.set_queue, methods=["PUT"]),
    Route("/api/workers", operations.get_workers, methods=["GET"]),
    Route("/api/workers/{name:path}/drain", operations.drain_worker, methods=["POST"]),
    Route("/api/workers/{name:path}/resume", operations.resume_worker, methods=["POST"]),
    Route("/api/retention", retention.preview_retention, methods=["GET"]),
    Route("/api/retention", retention.run_retention, methods=["POST"]),
    Route("/api/keys", operations.get_keys, methods=["GET"]),
    Route("/api/secrets", secrets.get_secrets, methods=["GET"]),
    Route("/api/secrets/{name}", secrets.set_secret, methods=["PUT"]),
    Route("/api/secrets/{name}", secrets.remove_secret, methods=["DELETE"]),
    Route("/api/webhooks", webhooks.get_webhooks, methods=["GET"]),
    Route("/api/webhooks", webhooks.add_webhook, methods=["POST"]),
    Route("/api/webhooks/{webhook_id}", webhooks.get_one_webhook, methods=["GET"]),
    Route("/api/webhooks/{webhook_id}", webhooks.update_webhook, methods=["PATCH"]),
    Route("/api/webhooks/{webhook_id}", webhooks.remove_webhook, methods=["DELETE"]),
    Route("/api/webhooks/{webhook_id}/test", webhooks.test_webhook, methods=["POST"]),
    Route("/api/webhooks/{webhook_id}/deliveries", webhooks.get_deliveries, methods=["GET"]),
    Route("/api/webhooks/{webhook_id}/deliveries/{delivery_id}/replay", webhooks.replay, methods=["POST"]),
    Route("/v1/models", openai_models.get_models, methods=["GET"]),
    Route("/v1/models/{model:path}", openai_models.get_model, methods=["GET"]),
    Route("/v1/completions", openai_completions.complete, methods=["POST"]),
    Route("/v1/chat/completions", openai_completions.chat, methods=["POST"]),
    Route("/v1/embeddings", openai_embeddings.embed, methods=["POST"]),
    Route("/v1/files", openai_files.get_files, methods=["GET"]),
    Route("/v1/files", openai_files.upload_file, methods=["POST"]),
    Route("/v1/files/{file_id}", openai_files.get_one_file, methods=["GET"]),
    Route("/v1/files/{file_id}", openai_files.remove_file, methods=["DELETE"]),
    Route("/v1/files/{file_id}/content", openai_files.get_content, methods=["GET"]),
    Route("/v1/batches", openai_batches.get_batches, methods=["GET"]),
    Route("/v1/batches", openai_batches.create_batch, methods=["POST"]),
    Route("/v1/batches/{batch_id}", openai_batches.get_one_batch, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", openai_batches.cancel_batch, methods=["POST"]),
    Route("/v1/fine_tuning/jobs", openai_fine_tuning.get_jobs, methods=["GET"]),
    Route("/v1/fine_tuning/jobs", openai_fine_tuning.create_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}", openai_fine_tuning.get_one_job, methods=["GET"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel", openai_fine_tuning.cancel_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause", openai_fine_tuning.pause_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume", openai_fine_tuning.resume_job, methods=["POST"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}/events", openai_fine_tuning.get_events, methods=["GET"]),
    Route("/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints", openai_fine_tuning.get_checkpoints, methods=["GET"]),
    Route("/openapi.json", pages.get_openapi, methods=["GET"]),
    Route("/docs", pages.get_docs, methods=["GET"]),
    Route("/jobs", pages.get_page, methods=["GET"]),
    *(Route(path, pages.get_page, methods=["GET"]) for path in PAGE_PATHS),
    Route("/favicon.svg", pages.get_favicon, methods=["GET"]),
    Route("/assets/{name}", pages.get_asset, methods=["GET"]),
    Route("/ws/jobs", upgrade_required, methods=["GET"]),
    Route("/ws/jobs/{job_id}", upgrade_required, methods=["GET"]),
    WebSocketRoute("/ws/jobs", watch_jobs),
    WebSocketRoute("/ws/jobs/{job_id}", watch_job),
    WebSocketRoute("/{path:path}", refuse_unknown),
]


LOOPS = (
    sweep_loop,
    wake_up_loop,
    reap_loop,
    fire_loop,
    prune_loop,
    fold_loop,
    retention_loop,
    preempt_loop,
    batch_loop,
    advance_loop,
    webhook_loop,
    condition_loop,
    log_prune_loop,
)


def create_app(settings: Settings) -> Starlette:
    """Build the ASGI application. Its loops and connections start and stop with its lifespan."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        database = Database(settings.database)
        streams = LiveStreams(database, settings.redis)
        wake_ups, publisher = WakeUpPublisher(make_celery(settings)), LivePublisher(settings.redis)
        admissions, readiness = Admissions(database), Readiness(settings, database)
        wake_up_now = asyncio.Event()
        submissions = Submissions(settings, database, wake_ups, wake_up_now)
        metrics = Metrics(settings, database, streams)
        app.state.metrics = metrics
        service = Service(
            settings, database, wake_ups, publisher, admissions, readiness, submissions, metrics, wake_up_now
        )
        generations = GenerationStreams(settings.redis)
        app.state.service, app.state.streams, app.state.generations = service, streams, generations
        streaming = [generations.follow(), streams.follow(), streams.check_heads(), streams.run_maintenance()]
        loops = [*streaming, admissions.recheck_loop(), *(loop(service) for loop in LOOPS)]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            readiness.close()
            await submissions.close()
            await asyncio.to_thread(service.wake_ups.close)
            await asyncio.to_thread(service.publisher.close)
            database.dispose()

    app = Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        exception_handlers={
            ProblemError: on_problem,
            AptJobsError: on_apt_jobs_error,
            HTTPException: on_http_exception,
            Exception: on_unexpected,
        },
    )
    app.user_middleware.append(Middleware(RootPath, root_path=settings.root_path))
    app.user_middleware.append(Middleware(Measured))
    app.user_middleware.append(Middleware(Guard, settings=settings, service=lambda: app.state.service))
    return app


def document() -> dict[str, Any]:
    """Return the OpenAPI document of the route table above, without a running service."""
    return openapi_document(ROUTES)
