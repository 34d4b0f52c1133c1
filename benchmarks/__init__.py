"""liveblockd beside qemu-storage-daemon: the same images, command line and QMP, in turn."""
