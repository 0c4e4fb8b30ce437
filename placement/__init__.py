"""Where Ray puts the workers: placement groups, devices, ports, topology. Knows Ray and nothing of queues."""
