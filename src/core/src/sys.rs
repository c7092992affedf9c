//! The calls that need `unsafe` in this crate: the machine's own libzstd, found at run time.
//!
//! zstd's compressed bytes differ from version to version, and a package was compressed by the version of its release. That
//! is the one that is installed on the machines of the release, as dpkg needs it; the one built into this program is another.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;

type Size = usize;

type Version = unsafe extern "C" fn() -> c_uint;
type Create = unsafe extern "C" fn() -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void) -> Size;
type Set = unsafe extern "C" fn(*mut c_void, c_int, c_int) -> Size;
type Stream = unsafe extern "C" fn(*mut c_void, *mut Buffer, *mut Buffer, c_int) -> Size;
type IsError = unsafe extern "C" fn(Size) -> c_uint;
type ErrorName = unsafe extern "C" fn(Size) -> *const c_char;

/// `ZSTD_inBuffer` and `ZSTD_outBuffer` differ in the constness of the pointer only.
#[repr(C)]
struct Buffer {
    at: *mut c_void,
    size: Size,
    pos: Size,
}

const C_COMPRESSION_LEVEL: c_int = 100;
const C_CHECKSUM: c_int = 201;
const C_WORKERS: c_int = 400;
const E_CONTINUE: c_int = 0;
const E_END: c_int = 2;

/// The functions of a libzstd that has been loaded; it stays loaded.
#[derive(Clone, Copy)]
pub(crate) struct MachineZstd {
    version: u32,
    create: Create,
    free: Free,
    set: Set,
    stream: Stream,
    is_error: IsError,
    error_name: ErrorName,
}

impl std::fmt::Debug for MachineZstd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineZstd").field("version", &self.version).finish_non_exhaustive()
    }
}

impl MachineZstd {
    /// The machine's libzstd, loaded at the first call; `None` where there is none.
    pub(crate) fn find() -> Option<Self> {
        static FOUND: OnceLock<Option<MachineZstd>> = OnceLock::new();
        *FOUND.get_or_init(Self::load)
    }

    fn load() -> Option<Self> {
        // SAFETY: the name ends with a NUL; libzstd has no constructors that could do harm, dpkg runs it all the time.
        let library = unsafe { libc::dlopen(c"libzstd.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        let library = NonNull::new(library)?;
        let symbol = |name: &CStr| {
            // SAFETY: `library` is what dlopen gave and is never closed; the name ends with a NUL.
            NonNull::new(unsafe { libc::dlsym(library.as_ptr(), name.as_ptr()) }).map(NonNull::as_ptr)
        };
        /// What lies at a symbol, as the function type that is asked for.
        macro_rules! function {
            ($name:literal as $type:ty) => {
                // SAFETY: zstd.h declares the function with this type since 1.4.0, and the ABI of libzstd.so.1 is stable.
                unsafe { std::mem::transmute::<*mut c_void, $type>(symbol($name)?) }
            };
        }
        let version = function!(c"ZSTD_versionNumber" as Version);
        Some(Self {
            // SAFETY: takes nothing and returns a number.
            version: unsafe { version() },
            create: function!(c"ZSTD_createCCtx" as Create),
            free: function!(c"ZSTD_freeCCtx" as Free),
            set: function!(c"ZSTD_CCtx_setParameter" as Set),
            stream: function!(c"ZSTD_compressStream2" as Stream),
            is_error: function!(c"ZSTD_isError" as IsError),
            error_name: function!(c"ZSTD_getErrorName" as ErrorName),
        })
    }

    /// As `ZSTD_versionNumber`: 10504 is 1.5.4.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// Compresses `bytes` as dpkg-deb does, with so many worker threads, and hands over what comes out: `sized` in one step, by which
    /// the length gets into the head, otherwise in several.
    pub(crate) fn compress(
        &self,
        bytes: &[u8],
        level: i32,
        [checksum, sized]: [bool; 2],
        workers: u32,
        out: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        const STEP_BYTES: usize = 32 * 1024;
        // SAFETY: takes nothing; a null pointer is told apart below.
        let context = NonNull::new(unsafe { (self.create)() }).ok_or(io::ErrorKind::OutOfMemory)?;
        let context = Context { library: self, at: context };
        context.set(C_COMPRESSION_LEVEL, level)?;
        context.set(C_CHECKSUM, checksum.into())?;
        context.set(C_WORKERS, workers.cast_signed())?;
        let mut buffer = vec![0; 128 * 1024];
        if sized {
            return context.run(bytes, E_END, &mut buffer, out);
        }
        for step in bytes.chunks(STEP_BYTES) {
            context.run(step, E_CONTINUE, &mut buffer, out)?;
        }
        context.run(&[], E_END, &mut buffer, out)
    }

    fn check(&self, code: Size) -> io::Result<Size> {
        // SAFETY: takes a number only.
        if unsafe { (self.is_error)(code) } == 0 {
            return Ok(code);
        }
        // SAFETY: returns a string constant of the library for every number.
        let name = unsafe { CStr::from_ptr((self.error_name)(code)) };
        Err(io::Error::other(format!("zstd: {}", name.to_string_lossy())))
    }
}

/// A `ZSTD_CCtx`, freed when dropped.
struct Context<'a> {
    library: &'a MachineZstd,
    at: NonNull<c_void>,
}

impl Context<'_> {
    fn set(&self, parameter: c_int, value: c_int) -> io::Result<()> {
        // SAFETY: the context lives, and no compression is under way.
        self.library.check(unsafe { (self.library.set)(self.at.as_ptr(), parameter, value) }).map(drop)
    }

    /// Takes all of `step`, or ends the frame.
    fn run(&self, step: &[u8], end: c_int, buffer: &mut [u8], out: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        // libzstd does not write through the pointer of its input.
        let mut input = Buffer { at: step.as_ptr().cast_mut().cast(), size: step.len(), pos: 0 };
        loop {
            let mut output = Buffer { at: buffer.as_mut_ptr().cast(), size: buffer.len(), pos: 0 };
            // SAFETY: both buffers name live memory of their lengths, and the context lives.
            let left = self.library.check(unsafe { (self.library.stream)(self.at.as_ptr(), &raw mut output, &raw mut input, end) })?;
            out(&buffer[..output.pos.min(buffer.len())])?;
            if input.pos >= input.size && (end == E_CONTINUE || left == 0) {
                return Ok(());
            }
        }
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: it is freed once, here; with it end its worker threads.
        unsafe { (self.library.free)(self.at.as_ptr()) };
    }
}
