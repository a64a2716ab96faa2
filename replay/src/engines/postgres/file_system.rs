//! What may be relied on where a cluster is restored.

use std::fs::File;

/// File systems of local disks, by linux/magic.h: ext2 to ext4, XFS, Btrfs. Of others `syncfs` may say nothing, or mean less
/// (one in user space is not told to sync), and what goes around the page cache may not be what others read through it.
const LOCAL: [u32; 3] = [0xEF53, 0x5846_5342, 0x9123_683E];

/// Whether a file lies on a local disk's file system.
pub(super) fn is_local(file: &File) -> bool {
    // Its width differs between platforms, and a magic number has 32 bits.
    rustix::fs::fstatfs(file).is_ok_and(|about| {
        LOCAL.iter().any(|magic| i128::from(about.f_type) & 0xFFFF_FFFF == i128::from(*magic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_no_disk_is_not_local() {
        assert!(!is_local(&File::open("/proc/self/stat").unwrap()));
    }
}
