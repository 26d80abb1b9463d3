//! Whether tiles, AMX's registers, may be used.

use std::sync::OnceLock;

/// Whether the processor has tiles and the system lets this process use them. Asks it to, the first time.
pub(super) fn are_permitted() -> bool {
    static HERE: OnceLock<bool> = OnceLock::new();
    *HERE.get_or_init(|| {
        // leaf 7: bit 24 is `amx-tile`, bit 25 `amx-int8`
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        leaf.edx >> 24 & 3 == 3 && is_permitted()
    })
}

/// Linux gives a process the state of tiles when it asks for it.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILES: usize = 18;
    let result: isize;
    // SAFETY: a system call that touches no memory of ours; the kernel keeps all registers but these
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILES,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}
