"""All objects of one Baton service, from its settings file; two files make a canary."""

from __future__ import annotations

import hashlib
import json

import yaml

from kserve_adapter.manifest import guards, serving
from kserve_adapter.manifest.local_cache import local_model_caches
from kserve_adapter.manifest.pods import MODEL_DIR, Object
from kserve_adapter.manifest.pools import QUEUE_THRESHOLD, cluster_name, pool_label, pools
from kserve_adapter.manifest.settings import KubernetesSettings, PoolPods, kubernetes_settings
from runtime.config import ROLES, Config
from runtime.config_file import parse
from runtime.errors import ConfigError

BOUNDS_FOLLOW = (
    "scaling.prefill and scaling.decode follow from kubernetes.prefill and kubernetes.decode (min_replicas, "
    "max_replicas) where they are not given: change these, or replicas"
)
CLUSTER_SCOPED = ("ClusterServingRuntime", "LocalModelCache", "LocalModelNodeGroup")


def render(config: Config, canary: Config | None = None, percent: int = 0) -> list[Object]:
    """The objects of a service.

    Args:
        canary: the settings of a second revision, with pools of its own.
        percent: what share of the requests the canary gets.

    Raises:
        ConfigError: when the `kubernetes` section is wrong, the settings that follow from it are refused by every pod,
            or the two are not revisions of one service.
    """
    settings = kubernetes_settings(config)
    stable, objects = _revision(settings, config)
    objects = [guards.service_account(settings), *serving.runtimes(settings), *objects]
    second: serving.Revision | None = None
    if canary is not None:
        second, more = _revision(_of_one_service(settings, kubernetes_settings(canary)), canary)
        if second.name == stable.name:
            raise ConfigError("the canary is the same revision: change its model_uri or settings, or name it")
        objects += more
    if second is not None and settings.gateway:
        objects += [serving.inference_service(stable), serving.canary_service(second)]
        objects += serving.route(settings, percent)
    else:
        objects += [serving.inference_service(stable, second, percent), *serving.route(settings, None)]
    objects += local_model_caches([made.settings for made in (stable, second) if made])
    objects += guards.network_policies(settings) + guards.disruption_budgets(settings) + guards.monitors(settings)
    return [_in_namespace(item, settings.namespace) for item in objects]


def to_yaml(objects: list[Object]) -> str:
    """The objects as one stream of documents."""
    return yaml.dump_all(objects, Dumper=_NoAliases, sort_keys=False, width=120)


def revision_of(settings: KubernetesSettings, config: Config) -> str:
    """The revision's name: the one given, or a digest of the settings and of where the weights come from."""
    if settings.revision:
        return settings.revision
    pools_of = config.model_dump(exclude={"front_end", "name", "served_model_name", "kubernetes"})
    material = json.dumps([pools_of, settings.model_uri, settings.image], sort_keys=True)
    return hashlib.sha256(material.encode()).hexdigest()[:8]


def _revision(settings: KubernetesSettings, config: Config) -> tuple[serving.Revision, list[Object]]:
    name = revision_of(settings, config)
    settings_map = f"{cluster_name(settings, name)}-settings"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": settings_map, "labels": {"baton-name": settings.name, "baton-revision": name}},
        "data": {"settings.yaml": yaml.safe_dump(_in_cluster(settings, config, name), sort_keys=False)},
    }
    revision = serving.Revision(settings, name, settings_map, config.limits)
    return revision, [config_map, *pools(settings, config, name, settings_map)]


def _in_cluster(settings: KubernetesSettings, config: Config, revision: str) -> Object:
    """Baton's own settings as a pod reads them: without the cluster's, and with what follows from them.

    Raises:
        ConfigError: no pod would take them.
    """
    data = config.model_dump(exclude_unset=True, exclude={"kubernetes"})
    data["name"] = cluster_name(settings, revision)
    if settings.model_uri:
        data["model"] = MODEL_DIR
        data["served_model_name"] = settings.name
    if settings.api_keys_secret:
        data["front_end"] = {**data.get("front_end", {}), "api_keys_env": "BATON_API_KEYS"}
    if settings.pools != "embedded":
        data["scaling"] = _scaling(settings, data.get("scaling", {}))
        for role in ROLES:
            pool = dict(data.get(role, {}))
            pool["label_selector"] = {**pool_label(role), **pool.get("label_selector", {})}
            least, most = (data["scaling"][role][bound] for bound in ("min", "max"))
            pool.setdefault("replicas", min(max(1, least), most))
            data[role] = pool
    try:
        parse(data, "settings of the pods")
    except ConfigError as error:
        raise ConfigError(f"{error}\n{BOUNDS_FOLLOW}") from error
    return data


def _scaling(settings: KubernetesSettings, given: Object) -> Object:
    """The bounds of the pods are the bounds of the workers, and with KEDA's simple rule the rule is theirs too."""
    made = dict(given)
    for role in ROLES:
        pods: PoolPods = getattr(settings, role)
        own = {bound: value for bound, value in given.get(role, {}).items() if value is not None}
        made[role] = {"min": pods.min_replicas, "max": pods.max_replicas, **own}
    if settings.pools == "deployments" and settings.signal == "queue":
        made |= {"rule": "queue_depth", "queue_depth": float(QUEUE_THRESHOLD)}
    return made


def _of_one_service(stable: KubernetesSettings, canary: KubernetesSettings) -> KubernetesSettings:
    for key in ("name", "namespace", "mode"):
        if getattr(stable, key) != getattr(canary, key):
            raise ConfigError(f"kubernetes.{key} differs: a canary is another revision of the same service")
    return canary


def _in_namespace(item: Object, namespace: str | None) -> Object:
    if namespace is None or item["kind"] in CLUSTER_SCOPED:
        return item
    meta = {**item["metadata"], "namespace": namespace}
    return {**item, "metadata": meta}


class _NoAliases(yaml.SafeDumper):
    """Objects share parts; a manifest says them each time."""

    def ignore_aliases(self, data: object) -> bool:
        """Always."""
        return True
