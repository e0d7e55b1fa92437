//! ifnewer: a pull-through cache for container images.
